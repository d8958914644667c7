import pytest

from sparamx_onnx.models import sentences


def test_the_same_seed_gives_the_same_different_sentences() -> None:
    first = sentences.collect(200, seed=1)
    assert first == sentences.collect(200, seed=1)
    assert len(set(first)) == 200
    assert first != sentences.collect(200, seed=2)


def test_they_read_like_sentences() -> None:
    for sentence in sentences.collect(500):
        assert sentence[0].isupper()
        assert sentence[-1] in ".!?"
        assert 6 <= len(sentence.split()) <= 40


def test_more_than_there_are_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"hold \d+ sentences; 10000000 were asked for"):
        sentences.collect(10_000_000)
