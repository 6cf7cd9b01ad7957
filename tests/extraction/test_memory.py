"""A batch that the memory does not hold is run in parts; what is said, and what comes out."""

import logging

import pytest
import torch
from torch import Tensor

from mechdiff.errors import ConfigError
from mechdiff.extraction.extractor import Extractor
from mechdiff.extraction.memory import Parts
from tests.extraction import job
from tests.extraction.test_extractor import extract, shards

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
    MemoryError(),
]


def holds(most: int, error: BaseException, seen: list[int]):
    """Return what runs at most `most` texts at a time: rows are the token, with its text's first token."""

    def run(input_ids: Tensor, where: Tensor) -> list[Tensor]:
        seen.append(len(input_ids))
        if len(input_ids) > most:
            raise error
        text, token = where.unbind(-1)
        return [torch.stack([input_ids[text, token], input_ids[text, 0]], 1)]

    return run


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("texts", [1, 4, 7])
def test_halved_until_it_fits_and_said_once(
    error: BaseException, texts: int, caplog: pytest.LogCaptureFixture
) -> None:
    input_ids = torch.arange(texts * 3).view(texts, 3)
    where = torch.tensor([[text, token] for text in range(texts) for token in (1, 2)])
    parts, seen = Parts("base"), []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (rows,) = parts.run(holds(2, error, seen), input_ids, where)
            assert rows.tolist() == [[3 * t + token, 3 * t] for t in range(texts) for token in (1, 2)]
    assert len(caplog.records) == (texts > 2)
    assert seen.count(texts) == (1 if texts > 2 else 3), "the parts that fit are kept for what follows"


def test_one_text_that_does_not_fit_is_refused() -> None:
    run = holds(0, ERRORS[0], [])
    with pytest.raises(
        ConfigError, match=r"^tuned: the memory does not hold one text of 3 tokens; .*pair.dtype"
    ):
        Parts("tuned").run(run, torch.zeros(4, 3, dtype=torch.long), torch.tensor([[0, 1]]))


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        Parts("base").run(
            holds(0, RuntimeError("shape"), []), torch.zeros(2, 3).long(), torch.tensor([[0, 1]])
        )


def test_an_extraction_in_parts_gives_the_same_rows(tmp_path, monkeypatch, caplog) -> None:
    whole = extract(tmp_path / "whole")
    rows, ran = Extractor._rows, 0

    def few(self, input_ids, where):
        nonlocal ran
        if len(input_ids) > 2:
            raise ERRORS[0]
        ran += 1
        return rows(self, input_ids, where)

    monkeypatch.setattr(Extractor, "_rows", few)
    parts = extract(tmp_path / "parts")
    assert ran > 10
    assert "batches are run in halves" in caplog.text
    for site in job.SITES:
        torch.testing.assert_close(parts.read(site), whole.read(site), atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(parts.rows, whole.rows, strict=True))
    assert shards(tmp_path / "parts").keys() == shards(tmp_path / "whole").keys()
