"""Instruction tuning of a language model to answer questions from references."""

from datamodules.gpt2_webglm_qa.cited_answers import HubRecords, JSONLines
from datamodules.gpt2_webglm_qa.data import GPT2WebGLMQADataModule
from datamodules.gpt2_webglm_qa.python_questions import PythonQuestions

__all__ = ["GPT2WebGLMQADataModule", "HubRecords", "JSONLines", "PythonQuestions"]
