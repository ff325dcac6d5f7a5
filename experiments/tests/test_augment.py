"""Normalisation and augmentation of pictures."""

import pytest
import torch
from sparseout_experiments.data import images


def test_statistics_are_those_of_all_pixels_and_normalise_uses_them():
    pixels = torch.randint(256, (7, 3, 5, 4), dtype=torch.uint8)
    pixels[:, 1] = 200
    mean, std = images.statistics(images.Part(pixels, torch.zeros(7).long()))
    values = pixels.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(mean, values.mean(1).float())
    torch.testing.assert_close(std[::2], values.std(1, correction=0).float()[::2])
    assert std[1] == 1
    normal = images.normalise(pixels, mean, std)
    assert normal.dtype == torch.float32
    flat = normal.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(flat.std(1, correction=0)[::2], torch.ones(2).double(), atol=1e-6, rtol=0)


def by_loops(pixels, generator, pad, flip):
    """A picture at a time: reflected outside, cut out, mirrored."""
    n, _, height, width = pixels.shape
    down, right = torch.randint(2 * pad + 1, (2, n), generator=generator).tolist()
    mirrored = torch.randint(2, (n,), generator=generator).tolist()
    padded = torch.nn.functional.pad(pixels.float(), (pad,) * 4, mode="reflect").byte()
    out = torch.empty_like(pixels)
    for i in range(n):
        cut = padded[i, :, down[i] : down[i] + height, right[i] : right[i] + width]
        out[i] = cut.flip(2) if flip and mirrored[i] else cut
    return out


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_augment_does_what_loops_do(pad, flip, channels):
    pixels = torch.randint(256, (40, channels, 6, 5), dtype=torch.uint8)
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(2):
        out = images.augment(pixels, first, pad=pad, flip=flip)
        assert torch.equal(out, by_loops(pixels, second, pad, flip))
        assert out.dtype == torch.uint8


def test_augment_draws_equally_much_whatever_it_does():
    pixels = torch.zeros(9, 1, 6, 6, dtype=torch.uint8)
    states = []
    for pad, flip in ((0, False), (2, True)):
        generator = torch.Generator().manual_seed(3)
        images.augment(pixels, generator, pad=pad, flip=flip)
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("pad", [-1, 5])
def test_augment_refuses_to_reflect_beyond_the_picture(pad):
    with pytest.raises(ValueError, match=f"expected `pad` to be from 0 to 4, but got {pad}"):
        images.augment(torch.zeros(1, 1, 6, 5, dtype=torch.uint8), torch.Generator(), pad=pad, flip=False)
