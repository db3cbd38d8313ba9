from __future__ import annotations

import pytest
import torch
from tiny import random_batch, world_config

from latentplan.types import EnvSpec, UserError
from latentplan.world.decoder import ConvDecoder, Decoder
from latentplan.world.encoder import ConvEncoder, Encoder
from latentplan.world.image_normalizer import PATCH, ImageNormalizer

CODERS = pytest.mark.parametrize("coder", ["strided", "patch"])
MANY = EnvSpec(
    {
        "image": ((16, 32, 3), "uint8"),
        "joints": ((3,), "float32"),
        "camera": ((32, 32, 3), "uint8"),
        "touch": ((1,), "float32"),
    },
    2,
    1,
)


def features(n: int, size: int = 20) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(0))


def as_encoder_input(
    obs: dict[str, torch.Tensor], coder: str = "strided"
) -> dict[str, torch.Tensor]:
    """Observations whose images are patches with float values in [0, 1]."""
    return {
        name: ImageNormalizer(MANY.obs[name][0], PATCH[coder]).patchify(x).float() / 255
        if name in MANY.images
        else x
        for name, x in obs.items()
    }


@CODERS
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_any_mix_of_images_and_vectors_is_encoded_and_decoded(coder: str, norm: str) -> None:
    config = world_config(coder=coder, norm=norm)
    batch = random_batch(2, 3, MANY)[0]
    encoder, decoder = Encoder(MANY, config), Decoder(MANY, 20, config)
    embed = encoder(as_encoder_input(batch.obs, coder))
    assert embed.shape == (2, 3, encoder.size)
    # Four halvings to 1 x 2 and 2 x 2 positions, the channels doubling from 2 to 16.
    assert encoder.size == 16 * 2 + 16 * 4 + 8
    decoded = decoder(features(5))
    assert {name: x.shape for name, x in decoded.items()} == {
        name: (5, *x.shape[2:]) for name, x in as_encoder_input(batch.obs, coder).items()
    }


def test_every_observation_changes_the_embedding() -> None:
    torch.manual_seed(0)
    encoder = Encoder(MANY, world_config())
    obs = as_encoder_input(random_batch(2, 1, MANY)[0].obs)
    for name in obs:
        changed = {k: x.clone() for k, x in obs.items()}
        changed[name] = changed[name] + 3
        assert not torch.allclose(encoder(obs), encoder(changed)), name


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_magnitude_of_a_vector_changes_the_embedding(norm: str) -> None:
    """A norm after a linear map without bias would keep only the sign of a single number."""
    torch.manual_seed(0)
    encoder = Encoder(EnvSpec({"x": ((1,), "float32")}, 1, 1), world_config(norm=norm))
    a, b = encoder({"x": torch.tensor([[0.3], [0.9]])})
    assert (a - b).norm() > 0.1 * a.norm()


@CODERS
def test_the_encoder_distinguishes_positions(coder: str) -> None:
    """The upper right entry of the feature map depends only on the upper right of the image."""
    torch.manual_seed(0)
    encoder = ConvEncoder((64, 64, 3), world_config(coder=coder))
    image = torch.rand(1, 64, 64, 3, requires_grad=True)
    grid = encoder(ImageNormalizer((64, 64, 3), PATCH[coder]).patchify(image)).view(4, 4, -1)
    grid[0, 3].square().sum().backward()
    touched = image.grad[0].abs().sum(-1)
    assert touched[:16, 48:].any()
    assert not touched[40:].any() and not touched[:, :24].any()


@CODERS
def test_the_decoder_distinguishes_positions(coder: str) -> None:
    torch.manual_seed(0)
    decoder = ConvDecoder(20, (64, 64, 3), world_config(coder=coder))
    hidden = []
    decoder.input.register_forward_hook(lambda module, inputs, out: hidden.append(out))
    image = ImageNormalizer((64, 64, 3), PATCH[coder]).unpatchify(decoder(features(1)))
    for y, x, row, column in ((0, 63, 0, 3), (63, 0, 3, 0), (20, 44, 1, 2)):
        (gradient,) = torch.autograd.grad(image[0, y, x].sum(), hidden[0], retain_graph=True)
        strength = gradient.view(4, 4, -1).abs().sum(-1)
        assert strength[row, column] > 0
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        far = torch.maximum((rows - row).abs(), (columns - column).abs()) > 1
        assert not strength[far].any()


def test_decoded_vectors_have_the_names_of_the_observations() -> None:
    torch.manual_seed(0)
    decoder = Decoder(MANY, 20, world_config())
    decoder.mlp.output.weight.data.zero_()
    decoder.mlp.output.bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    decoded = decoder(features(2))
    assert decoded["joints"].tolist() == [[1, 2, 3]] * 2 and decoded["touch"].tolist() == [[4]] * 2


@pytest.mark.parametrize("size", [8, 40, 100])
def test_a_size_that_cannot_be_halved_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=r"env.image_size divisible by 16"):
        ConvEncoder((size, size, 3), world_config())
