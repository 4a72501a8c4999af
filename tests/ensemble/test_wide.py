"""Operations over wide vocabularies give what torch's own do."""

import pytest
import torch

from hf_spec_ensemble.ensemble.wide import BLOCK, argmax, columns, greatest_two


@pytest.mark.parametrize("size", [5, 2 * BLOCK, 2 * BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 7])
def test_they_are_torchs_own(size):
    generator = torch.Generator().manual_seed(size)
    for shape in ((size,), (3, size), (2, 3, size)):
        values = torch.randn(shape, generator=generator)
        assert torch.equal(argmax(values), values.argmax(-1))
        index = torch.randint(size, (11,), generator=generator)
        assert torch.equal(columns(values, index), values[..., index])
    for first, second in ((0, 1), (size - 1, size - 2), (1, size - 1), (size // 2, 0)):
        values = torch.rand(size, generator=generator)
        for lead in (3.0, 2.0):  # one greatest, and two
            values[first], values[second] = lead, 2.0
            assert greatest_two(values) == (lead, 2.0)
            assert argmax(values) == (first if lead == 3.0 else min(first, second))
    assert argmax(torch.full((3 * BLOCK,), -torch.inf)) == 0
    values[3] = torch.nan
    assert argmax(values) == 3
