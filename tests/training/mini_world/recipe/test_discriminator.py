"""The generator's adversary: what it is made of, and that growing keeps its mind."""

import torch
from indomain_guidance.training.mini_world.recipe.discriminator import Discriminator, ScaledConv, batch_deviation


def test_scaled_convolutions_keep_the_variance_of_their_input():
    torch.manual_seed(0)
    answer = ScaledConv(32, 64, 3)(torch.randn(8, 32, 16, 16))
    assert abs(float(answer[:, :, 1:-1, 1:-1].detach().std()) - 1) < 0.1


def test_batch_deviation_is_the_mean_deviation_over_each_group():
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    answer = batch_deviation(x, group=4)
    assert torch.equal(answer[:, :3], x)
    for first in (0, 1):  # members of a group stand two apart
        members = x[first::2]
        expected = members.var(0, unbiased=False).add(1e-8).sqrt().mean()
        assert torch.allclose(answer[first::2, 3], expected.expand(4, 4, 4))
    assert torch.allclose(batch_deviation(x[:1].repeat(4, 1, 1, 1), 4)[:, 3], torch.tensor(1e-4))


def test_the_logit_depends_on_the_picture_at_every_resolution():
    torch.manual_seed(0)
    network = Discriminator((8, 8, 8))
    pictures = torch.randn(4, 1, 16, 16, requires_grad=True)
    logits = network(pictures)
    logits.square().sum().backward()
    assert logits.shape == (4,) and float(pictures.grad.abs().min()) > 0
    assert all(float(parameter.grad.abs().max()) > 0 for name, parameter in network.named_parameters())


def test_a_grown_discriminator_answers_as_the_smaller_one_did_then_learns_in_every_part():
    torch.manual_seed(0)
    smaller, larger = Discriminator((8, 8)), Discriminator((8, 8, 8))
    pictures = torch.randn(4, 1, 16, 16)
    before = larger(pictures)
    larger.grown_from(smaller)
    expected = smaller(torch.nn.functional.avg_pool2d(pictures, 2))
    assert torch.allclose(larger(pictures), expected, atol=1e-6) and not torch.allclose(before, expected, atol=1e-3)
    larger(pictures).sum().backward()
    assert float(larger.down16.weight.grad.abs().max()) > 0
