"""Instruction tuning of a language model to answer questions from references."""

from lightning_modules.gpt2_webglm_qa.answers import AnswerQuestions
from lightning_modules.gpt2_webglm_qa.module import GPT2WebGLMQAModule
from lightning_modules.gpt2_webglm_qa.show_records import ShowRecords

__all__ = ["AnswerQuestions", "GPT2WebGLMQAModule", "ShowRecords"]
