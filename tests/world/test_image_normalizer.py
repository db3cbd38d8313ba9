from __future__ import annotations

import pytest
import torch
from tiny import BOTH, agent_config, random_batch, world_config

from latentplan.agent import Agent
from latentplan.nn import cache
from latentplan.world.image_normalizer import FITTED, ImageNormalizer
from latentplan.world.model import WorldModel

SHAPE = (4, 6, 3)


def scenes(n: int, seed: int = 0) -> torch.Tensor:
    """``n`` images with a fixed background and one pixel that is randomly black or white."""
    rng = torch.Generator().manual_seed(seed)
    background = torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(9))
    scene = background.expand(n, *SHAPE).clone()
    scene[:, 1, 2] = 255 * torch.randint(2, (n, 1), generator=rng)
    return scene.byte()


def test_without_statistics_images_are_only_centered() -> None:
    image = scenes(3)
    torch.testing.assert_close(ImageNormalizer(SHAPE, 1).normalize(image), image / 255 - 0.5)


def test_constant_pixels_are_zero_and_moving_pixels_are_large() -> None:
    normalizer = ImageNormalizer(SHAPE, 1)
    for seed in range(5):
        normalizer.fit(scenes(32, seed).unflatten(0, (4, 8)))
    x = normalizer.normalize(scenes(64, 77))
    moving = torch.zeros(SHAPE, dtype=torch.bool)
    moving[1, 2] = True
    assert x[:, ~moving].abs().max() < 1e-3
    assert 0.7 < x[:, moving].square().mean().sqrt() < 1.0


def test_the_statistics_are_those_of_all_fitted_batches() -> None:
    normalizer = ImageNormalizer(SHAPE, 1)
    batches = [scenes(8, seed) for seed in range(3)]
    for batch in batches:
        normalizer.fit(batch)
    x = torch.cat(batches) / 255
    torch.testing.assert_close(normalizer.mean, x.mean(0))
    variance = x.var(0, correction=0).mean(-1, keepdim=True)
    expected = variance.sqrt() + 0.3 * variance.mean().sqrt() + 1e-3
    torch.testing.assert_close(normalizer.spread, expected.expand(SHAPE))


def test_the_statistics_are_fixed_after_the_first_batches() -> None:
    normalizer = ImageNormalizer(SHAPE, 1)
    for seed in range(FITTED):
        normalizer.fit(scenes(2, seed))
    before = {k: x.clone() for k, x in normalizer.state_dict().items()}
    normalizer.fit(255 - scenes(2))
    for name, x in normalizer.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_denormalize_inverts_normalize() -> None:
    normalizer, image = ImageNormalizer(SHAPE, 1), scenes(4)
    normalizer.fit(image)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(image)), image / 255)


def test_an_update_fits_the_statistics_and_the_state_dict_holds_them() -> None:
    agent, other = (Agent(BOTH, agent_config()) for _ in range(2))
    agent.update(*random_batch(2, 4, BOTH))
    fitted = agent.world.image_normalizers["image"]
    assert fitted.batches == 1 and not torch.equal(fitted.mean, torch.full((16, 16, 3), 0.5))
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.world.image_normalizers["image"].spread, fitted.spread)


@pytest.mark.parametrize("coder", ["strided", "patch"])
def test_reconstruction_loss_is_in_units_of_the_image(coder: str) -> None:
    """The loss of an error in the denormalized image does not depend on the statistics."""
    torch.manual_seed(0)
    world = WorldModel(BOTH, world_config(recon_scale=2.0, coder=coder))
    obs = {name: x[:, 0] for name, x in random_batch(4, 1, BOTH)[0].obs.items()}
    world.fit_normalizers({name: x[:, None] for name, x in random_batch(8, 1, BOTH)[0].obs.items()})
    features = torch.randn(4, world.feature_size)
    raw = world.decoder(features)
    restored = world.image_normalizers["image"].denormalize(raw["image"])
    terms = world._reconstruction(features, world.prepare(obs))
    image = (restored - obs["image"] / 255).square().sum((1, 2, 3)).mean()
    standardized = world.vector_normalizers["vector"].normalize(obs["vector"])
    vector = (raw["vector"] - standardized).square().sum(1).mean()
    torch.testing.assert_close(terms["image"], 2 * image)
    torch.testing.assert_close(terms["vector"], 2 * vector)


def test_a_patch_is_a_square_of_the_image() -> None:
    normalizer = ImageNormalizer((8, 12, 3), 4)
    image = torch.randint(256, (2, 5, 8, 12, 3)).byte()
    cut = normalizer.patchify(image)
    assert cut.shape == (2, 5, 2, 3, 48) and cut.dtype == torch.uint8 and cut.is_contiguous()
    for row, column in ((0, 0), (1, 0), (0, 2)):
        square = image[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(cut[:, :, row, column], square.flatten(2))
    assert torch.equal(normalizer.unpatchify(cut), image)


def test_statistics_per_pixel_do_not_depend_on_the_patch_size() -> None:
    whole, patches = ImageNormalizer((8, 8, 3), 1), ImageNormalizer((8, 8, 3), 4)
    image, x = torch.randint(256, (6, 8, 8, 3)).byte(), torch.randn(6, 8, 8, 3)
    for normalizer in (whole, patches):
        normalizer.fit(image)
    torch.testing.assert_close(
        patches.unpatchify(patches.normalize(patches.patchify(image))), whole.normalize(image)
    )
    torch.testing.assert_close(patches.denormalize(patches.patchify(x)), whole.denormalize(x))
    errors = patches.squared_error(patches.patchify(x), patches.patchify(image))
    torch.testing.assert_close(errors, whole.squared_error(x, image))


@pytest.mark.parametrize("numbers", [1, 3 * 72, 2**18])  # one image at a time, three, or all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_result_of_the_whole(
    numbers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "NUMBERS", numbers)
    torch.manual_seed(0)
    normalizer, image = ImageNormalizer(SHAPE, 1), scenes(7)
    normalizer.fit(scenes(4))
    # Both results are rounded once, at the end.
    plain = ((image / 255 - normalizer.mean) / normalizer.spread).to(dtype)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(normalizer.normalize(image[None], dtype)[0], plain, **close)
    x, weight = torch.randn(7, *SHAPE).to(dtype).requires_grad_(), torch.rand(7)
    error = normalizer.squared_error(x, image)
    (grad,) = torch.autograd.grad((weight * error).sum(), x)
    expected = (normalizer.denormalize(x.float()) - image / 255).square().sum((1, 2, 3))
    (expected_grad,) = torch.autograd.grad((weight * expected).sum(), x)
    assert error.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(grad, expected_grad, **close)
