"""The augmentation pipe: each change by hand, none at p = 0, how often, and that it can be differentiated twice."""

import dataclasses

import pytest
import torch

from pipeline.gan.augment import NUM_UNIFORMS, AugmentConfig, adapted, augment, resample

NOTHING = AugmentConfig(mode="fixed", flip=0, rotate=0, shift=0, scale=0, colour=0, cutout=0)
CHANGES = ("flip", "rotate", "shift", "scale", "colour", "cutout")


def draw(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, NUM_UNIFORMS, generator=torch.Generator().manual_seed(seed)).clamp(1e-6, 1 - 1e-6)


def photo(rows: int = 1, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def only(**weights: float) -> AugmentConfig:
    return dataclasses.replace(NOTHING, **weights)


def columns(**values: float) -> torch.Tensor:
    """Uniforms that ask for nothing (a gate is open below p × weight) but what is named, by its place in the pipe."""
    names = [
        *("flip", "flip_gate", "quarter", "quarter_gate", "shift_x", "shift_y", "shift_gate", "scale", "scale_gate"),
        *("angle", "angle_gate", "stretch", "stretch_gate", "nudge_gate", "nudge_x", "nudge_y"),
        *("brightness", "brightness_gate", "contrast", "contrast_gate", "swap", "swap_gate", "hue", "hue_gate"),
        *("saturation", "saturation_gate", "cutout_gate", "cutout_y", "cutout_x"),
    ]
    assert len(names) == NUM_UNIFORMS
    return torch.tensor([[values.get(name, 0.999 if name.endswith("gate") else 0.5) for name in names]])


def changed(image: torch.Tensor, config: AugmentConfig, **values: float) -> torch.Tensor:
    return augment(image, columns(**values).expand(len(image), -1), 0.5, config)


def test_p_zero_and_no_weight_change_nothing() -> None:
    image = photo(8)
    assert augment(image, draw(8), 0.0, AugmentConfig(mode="fixed")) is image
    assert torch.allclose(augment(image, draw(8), 1.0, NOTHING), image, atol=1e-5)


def test_changes_by_hand() -> None:
    image = photo()
    assert torch.allclose(changed(image, only(flip=1), flip=0.9, flip_gate=0.0), image.flip(3), atol=1e-5)
    for quarters in (1, 2, 3):
        turned = changed(image, only(rotate=1), quarter=quarters / 4 + 0.1, quarter_gate=0.0)
        assert torch.allclose(turned, image.rot90(quarters, (2, 3)), atol=1e-5)
    moved = changed(image, only(shift=1), shift_x=0.999, shift_y=0.5, shift_gate=0.0)  # by an eighth: two pixels
    assert torch.allclose(moved[..., :-2], image[..., 2:], atol=1e-5)
    brighter = changed(image, only(colour=1), brightness=0.8413447, brightness_gate=0.0)  # one standard deviation
    assert torch.allclose(brighter, image + 0.2, atol=1e-3)
    contrast = changed(image, only(colour=1), contrast=0.8413447, contrast_gate=0.0)
    assert torch.allclose(contrast, image * 2**0.5, atol=1e-3)
    grey = image.mean(dim=1, keepdim=True)
    swapped = changed(image, only(colour=1), swap=0.9, swap_gate=0.0)
    assert torch.allclose(swapped, image - 2 * grey, atol=1e-5)
    saturated = changed(image, only(colour=1), saturation=0.8413447, saturation_gate=0.0)
    assert torch.allclose(saturated, grey + 2 * (image - grey), atol=1e-3)


def test_hue_turns_red_into_green_and_keeps_grey() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16).contiguous()
    turned = changed(red, only(colour=1), hue=0.5 + 1 / 3, hue_gate=0.0)[0, :, 8, 8]  # a third of a turn
    assert torch.allclose(turned, torch.tensor([0.0, 1.0, 0.0]), atol=1e-4)
    grey = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(changed(grey, only(colour=1), hue=0.9, hue_gate=0.0), grey, atol=1e-5)


def test_scale_and_stretch_keep_the_middle_and_move_the_rim() -> None:
    ramp = torch.linspace(-1, 1, 17)[:16].expand(1, 1, 16, 16).contiguous()
    slope = (ramp[0, 0, 8, 9] - ramp[0, 0, 8, 8]).item()
    for name, wanted in (("scale", 2**0.2), ("stretch", 2**0.2)):
        larger = changed(ramp, only(scale=1), **{name: 0.8413447, f"{name}_gate": 0.0})
        assert (larger[0, 0, 8, 9] - larger[0, 0, 8, 8]).item() == pytest.approx(slope * wanted, rel=0.02)
        assert larger[0, 0, 8, 7:9].mean().item() == pytest.approx(ramp[0, 0, 8, 7:9].mean().item(), abs=1e-5)
    upright = ramp.mT.contiguous()  # stretching one way squeezes the other
    squeezed = changed(upright, only(scale=1), stretch=0.8413447, stretch_gate=0.0)
    assert (squeezed[0, 0, 9, 8] - squeezed[0, 0, 8, 8]).item() == pytest.approx(slope / 2**0.2, rel=0.02)


def test_a_nudge_goes_between_pixels() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    nudged = changed(ramp, only(shift=1), nudge_x=0.5 + 0.0625, nudge_y=0.5, nudge_gate=0.0)
    moved = (nudged - ramp)[0, 0, 8, 5:8]
    assert torch.allclose(moved, moved[:1].expand(3), atol=1e-4)
    assert 0 < moved[0].item() % 1 < 1


def test_cutout_is_a_square_of_half_the_height() -> None:
    image = torch.ones(1, 3, 16, 16)
    cut = changed(image, only(cutout=1), cutout_gate=0.0, cutout_x=0.5, cutout_y=0.5)
    assert (cut == 0).sum() == 3 * 8 * 8
    assert not cut[:, :, 4:12, 4:12].any()
    corner = changed(image, only(cutout=1), cutout_gate=0.0, cutout_x=0.01, cutout_y=0.99)
    assert not corner[:, :, 12:, :4].any()
    assert (corner == 0).sum() == 3 * 4 * 4


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_change_is_made_about_as_often_as_p_says(change: str, channels: int) -> None:
    image = photo(1, channels).expand(2000, -1, -1, -1)
    found = augment(image, draw(2000), 0.4, only(**{change: 0.5}))
    share = (found - image).abs().amax(dim=(1, 2, 3)).gt(1e-3).float().mean().item()
    once, twice, coloured = 0.2, 1 - 0.8**2, 1 - 0.8 ** (4 if channels == 3 else 2) * 0.9
    # Half of the flips, a quarter of the turns and half of the swaps leave the image as it was.
    wanted = {
        "flip": once / 2,
        "rotate": 1 - (1 - 0.2 * 0.75) * 0.8,
        "shift": twice,
        "scale": twice,
        "colour": coloured,
        "cutout": once,
    }[change]
    assert share == pytest.approx(wanted, abs=0.04)


def test_rows_do_not_depend_on_each_other() -> None:
    image, uniforms, config = photo(6), draw(6), AugmentConfig(mode="fixed")
    together = augment(image, uniforms, 0.8, config)
    alone = torch.cat([augment(image[i : i + 1], uniforms[i : i + 1], 0.8, config) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_first_and_second_derivatives_in_the_image() -> None:
    """In float64, by differences: R1 goes through it twice."""
    image = photo(2, 3, 6).to(torch.float64).requires_grad_(True)
    uniforms, config = draw(2, seed=5), AugmentConfig(mode="fixed", colour=1.0)

    def through(x: torch.Tensor) -> torch.Tensor:
        return augment(x, uniforms, 1.0, config)

    assert torch.autograd.gradcheck(through, image)
    assert torch.autograd.gradgradcheck(lambda x: through(x).square(), image)


def test_resampling_is_pytorchs() -> None:
    image = photo(2, 3, 8)
    grid = torch.rand(2, 8, 8, 2) * 3 - 1.5
    wanted = torch.nn.functional.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    assert torch.equal(resample(image, grid), wanted)


def test_it_runs_in_float32_under_autocast() -> None:
    image, uniforms, config = photo(2), draw(2), AugmentConfig(mode="fixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = augment(image, uniforms, 0.8, config)
    assert torch.equal(found, augment(image, uniforms, 0.8, config))


def test_ada_moves_towards_its_target_and_stays_a_probability() -> None:
    config = AugmentConfig(mode="adaptive", target=0.6, ramp_kimg=500)
    assert adapted(0.3, 0.7, 5000, config) == pytest.approx(0.31)
    assert adapted(0.3, 0.5, 5000, config) == pytest.approx(0.29)
    assert adapted(0.005, 0.0, 5000, config) == 0.0
    assert adapted(0.995, 1.0, 5000, config) == 1.0


@pytest.mark.parametrize(
    "bad", [{"p": (0.1, 0.2, 0.3)}, {"p": (1.5,)}, {"flip": -1.0}, {"ramp_kimg": 0.0}, {"target": 1.0}]
)
def test_settings_that_mean_nothing(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        AugmentConfig(**bad)
