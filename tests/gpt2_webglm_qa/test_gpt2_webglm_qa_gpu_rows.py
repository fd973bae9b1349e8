"""What the benchmark of a GPU compares the instruction tuning with."""

from gpt2_webglm_qa.gpu_rows import PadToLongest


def test_padded_records_have_few_lengths():
    collate = PadToLongest()
    rows = [{"input_ids": [1] * length, "labels": [2] * length} for length in range(1, 65)]
    batches = [collate([rows[0], row]) for row in rows]
    assert {batch["input_ids"].shape for batch in batches} == {(2, length) for length in (16, 32, 48, 64)}
    assert [batch["attention_mask"].sum().item() for batch in batches] == list(range(2, 66))
    assert [(batch["labels"] == 2).sum().item() for batch in batches] == list(range(2, 66))
