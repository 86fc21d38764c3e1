"""The comparisons of compare.py fail where they must, and say what a reader needs."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits, assert_within

NAN = float("nan")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint16, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 4)])
def test_equal_tensors_pass(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    assert_same_bits(tensor, tensor.clone())
    assert_within(tensor, tensor.clone(), 0)


def test_other_strides_are_no_difference() -> None:
    tensor = torch.randn(4, 3)
    assert_same_bits(tensor.T, tensor.T.contiguous())


def test_bits_decide() -> None:
    nan = torch.tensor([NAN])
    assert_same_bits(nan, nan.clone())
    with pytest.raises(AssertionError, match="1 of 1 elements"):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (torch.zeros(3, 2), r"got torch.float32 of shape \(2, 3\), want .* of shape \(3, 2\)"),
        (torch.zeros(2, 3).half(), r"got torch.float32 .*, want torch.float16"),
    ],
)
def test_another_form_is_a_difference(other: torch.Tensor, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        assert_same_bits(torch.zeros(2, 3), other)


def test_message_names_the_first_and_the_worst() -> None:
    want = torch.arange(24.0).view(4, 6)
    got = want.clone()
    got.view(-1)[10:18] += 0.5
    got[2, 4] = -7
    with pytest.raises(AssertionError) as error:
        assert_same_bits(got, want, "codebook")
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "codebook: 8 of 24 elements of torch.float32 of shape (4, 6) are not the same bits"
    )
    assert lines[1].split() == ["index", "got", "want", "difference"]
    assert lines[2].split() == ["(1,", "4)", "10.5", "10", "0.5"]
    assert len(lines) == 2 + 5 + 1
    assert lines[-1].split() == ["(2,", "4)", "-7", "16", "-23", "the", "worst", "of", "all", "8"]


def test_integers_are_printed_whole() -> None:
    with pytest.raises(AssertionError, match=r"\(0,\) +9007199254740993 +9007199254740992"):
        assert_same_bits(torch.tensor([2**53 + 1]), torch.tensor([2**53]))


def test_within_knows_the_bound_of_each_element() -> None:
    got, want = torch.tensor([1.0, 2.0, 3.5]), torch.tensor([1.25, 2.5, 3.0], dtype=torch.float64)
    assert_within(got, want, torch.tensor([0.25, 0.5, 0.5]))
    with pytest.raises(AssertionError) as error:
        assert_within(got, want, torch.tensor([0.25, 0.1, 0.4]))
    lines = str(error.value).splitlines()
    assert lines[0] == ("2 of 3 elements of torch.float32 of shape (3,) are not within the bound")
    assert lines[1].split() == ["index", "got", "want", "difference", "bound"]
    assert lines[2].split() == ["(1,)", "2", "2.5", "-0.5", "0.100000001"]
    assert lines[-1].split()[:5] == lines[2].split()


@pytest.mark.parametrize(("got", "want"), [(NAN, 0.0), (0.0, NAN), (NAN, NAN)])
def test_nan_is_within_no_bound(got: float, want: float) -> None:
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        assert_within(torch.tensor([0.0, got]), torch.tensor([0.0, want]), float("inf"))


def test_within_broadcasts_what_is_wanted_but_not_what_came() -> None:
    assert_within(torch.full((2, 3), 1.5), 1.0, torch.full((2, 1), 0.5))
    with pytest.raises(AssertionError, match=r"got shape \(3,\), want shape \(2, 3\)"):
        assert_within(torch.zeros(3), torch.zeros(2, 3), 1)
