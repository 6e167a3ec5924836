"""The whole step: the released update's numbers, the default mode's expectation, half precision, cost and refusals."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from indomain_guidance.guidance.diffusion import Denoiser
from indomain_guidance.guidance.distillation.bridge import SDSBridge
from indomain_guidance.guidance.distillation.critic import Critic
from indomain_guidance.guidance.distillation.dds import DDS
from indomain_guidance.guidance.distillation.directional import Directional
from indomain_guidance.guidance.distillation.gradients import clamp_image_gradient, inject
from indomain_guidance.guidance.distillation.image_encoder import ImageEncoder
from indomain_guidance.guidance.distillation.nfsd import NFSD
from indomain_guidance.guidance.distillation.objective import Draws, NotFinite, Objective
from indomain_guidance.guidance.distillation.perceptual import FeatureDistance, Perceptual
from indomain_guidance.guidance.distillation.reconstruction import Reconstruction
from indomain_guidance.guidance.distillation.sds import SDS
from indomain_guidance.guidance.distillation.timesteps import Timesteps
from indomain_guidance.guidance.errors import GuidanceError
from torch.nn import functional as F

GOLDENS = dict(np.load(Path(__file__).parent / "goldens" / "sgf_update.npz"))
CLAMPED = dict(np.load(Path(__file__).parent / "goldens" / "sgf_clamped.npz"))
JUDGED_PX = 24  # of the images in both


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDENS[name])


class Network(torch.nn.Module):
    """The network the goldens were made with."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("w1", "b1", "c1", "w2", "gain"):
            self.register_parameter(name, torch.nn.Parameter(golden(name), requires_grad=False))

    def forward(self, x, timesteps, context):
        text = context.mean(1).to(x.dtype) @ self.c1.T + self.b1 * (timesteps.to(x.dtype).reshape(-1, 1) / 1000)
        hidden = torch.tanh(F.conv2d(x, self.w1) + text[:, :, None, None])
        return self.gain * x + F.conv2d(hidden, self.w2, padding=1)


def golden_encode(images):
    return torch.tanh(F.conv2d(images, golden("e1").to(images.dtype), stride=4)) * 5 * 0.18215


def golden_critic(schedule, scale: float, dtype=torch.float32) -> Critic:
    context = golden("ctx")
    denoiser = Denoiser(Network().to(dtype), schedule)
    return Critic.cfg(denoiser, {"context": context[:1]}, {"context": context[1:]}, scale)


def regularizer(kind: int, normalized: bool, weight: float) -> list:
    return [[], [Directional(weight, normalized)], [Reconstruction(weight)]][kind]


# ---------------------------------------------------------------------------------------------------------------------
# The released update


@pytest.mark.parametrize("number", range(len(GOLDENS["cases"])))
def test_sgf_mode_is_the_released_update(schedule, relative_error, number):
    index, t, kind, clamp, of_direction, of_noise, weight, scale = GOLDENS["cases"][number].tolist()
    objective = Objective(
        golden_critic(schedule, scale),
        SDS(normalize=bool(of_noise)),
        regularizer(int(kind), bool(of_direction), weight),
        latent_clamp=1.0,
        image_quantile=0.95 if clamp else None,
        mode="sgf",
    )
    images, frozen = golden("images")[int(index)], golden("frozen")[int(index)]
    names = ["sds", *(one.name for one in objective.regularizers)]
    draws = Draws(torch.tensor([int(t)]), dict(zip(names, golden(f"noise{number}").split(1))))
    scaled = images.clone().requires_grad_()
    report = objective.backward(scaled * 1.0, frozen, golden_encode, step=0, steps=10, draws=draws)
    assert relative_error(scaled.grad, golden(f"gradient{number}")) < 1e-4
    for name, logged in zip(names, GOLDENS[f"loss{number}"]):
        assert report.loss[name] == pytest.approx(logged, rel=1e-4)
    assert objective.critic.calls == 1


def golden_distance(images, frozen):
    """What stood for LPIPS in the goldens with the image clamp."""
    return 1e-3 * ((golden_encode(images) - golden_encode(frozen)) / 0.18215).square().mean((1, 2, 3))


def clamped_case(number: int, schedule, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """(The gradient that an objective in mode `sgf` puts on a generator's image, the released one)."""
    size, _, t, kind, of_direction, of_noise, weight, scale, perceptual = CLAMPED["cases"][number].tolist()
    raw, frozen = (torch.from_numpy(CLAMPED[f"{name}{number}"]).float() for name in ("raw", "frozen"))
    assert raw.shape[-1] == size
    objective = Objective(
        **{
            "critic": golden_critic(schedule, scale),
            "method": SDS(normalize=bool(of_noise)),
            "regularizers": regularizer(int(kind), bool(of_direction), weight),
            "latent_clamp": 1.0,
            "image_quantile": 0.95,
            "mode": "sgf",
            "perceptual": Perceptual(golden_distance, perceptual) if perceptual else None,
            **changes,
        }
    )
    noise = torch.from_numpy(CLAMPED[f"noise{number}"]).split(1)
    draws = Draws(torch.tensor([int(t)]), dict(zip(["sds", *(one.name for one in objective.regularizers)], noise)))
    encode = ImageEncoder(golden_encode, JUDGED_PX)
    leaf = raw.clone().requires_grad_()
    report = objective.backward(leaf * 1.0, frozen, encode, step=0, steps=10, draws=draws)
    if not changes:
        logged = [report.loss.get(name, 0.0) for name in ("sds", (*draws.noise, "none")[1])]
        assert logged == pytest.approx(CLAMPED[f"loss{number}"][:2].tolist(), rel=1e-4)
        assert report.loss.get("perceptual", 0.0) == pytest.approx(float(CLAMPED[f"loss{number}"][2]), rel=1e-4)
        assert report.gradient_norm["image"] == pytest.approx(float(leaf.grad.norm()), rel=1e-5)
    return leaf.grad, torch.from_numpy(CLAMPED[f"gradient{number}"])


@pytest.mark.parametrize("number", range(len(CLAMPED["cases"])))
def test_sgf_mode_is_the_released_update_of_images_of_any_size_and_saturation(schedule, relative_error, number):
    assert relative_error(*clamped_case(number, schedule)) < 1e-4


def test_the_image_clamp_in_the_wrong_place_would_stand_out(schedule, relative_error, monkeypatch):
    """Where the gradient is clamped after it went back through clamp and resize, as it was here once."""
    number = next(n for n, row in enumerate(CLAMPED["cases"].tolist()) if row[0] == 32 and not row[8])
    late = []

    def not_yet(gradient, q):
        late.append(q)
        return gradient, gradient.new_zeros(())

    monkeypatch.setattr("indomain_guidance.guidance.distillation.objective.clamp_image_gradient", not_yet)
    found, expected = clamped_case(number, schedule, regularizers=[], perceptual=None)
    monkeypatch.undo()
    right, _ = clamped_case(number, schedule, regularizers=[], perceptual=None)
    assert late and relative_error(clamp_image_gradient(found, 0.95)[0], right) > 0.02


def test_the_goldens_tell_settings_apart(schedule, relative_error):
    """Each feature of the released update moves the result by far more than the tolerance above."""
    wrong = {"latent_clamp": None, "image_quantile": None, "mode": "shared", "weighting": "uniform"}
    number = next(n for n, row in enumerate(GOLDENS["cases"].tolist()) if row[2] == 1 and row[3] and not row[4])
    index, t, _, _, _, _, weight, scale = GOLDENS["cases"][number].tolist()
    draws = Draws(torch.tensor([int(t)]), dict(zip(("sds", "directional"), golden(f"noise{number}").split(1))))
    for name, value in wrong.items():
        settings = {"latent_clamp": 1.0, "image_quantile": 0.95, "mode": "sgf", name: value}
        objective = Objective(golden_critic(schedule, scale), SDS(), [Directional(weight)], **settings)
        gradient, _ = objective.image_gradient(
            golden("images")[int(index)], golden("frozen")[int(index)], golden_encode, step=0, steps=10, draws=draws
        )
        assert relative_error(gradient, golden(f"gradient{number}")) > 5e-3, name


# ---------------------------------------------------------------------------------------------------------------------
# Images beyond their range


def clamped_encode(images):
    return golden_encode(images.clamp(-1, 1))


def test_beyond_the_bound_only_what_leads_back_remains(schedule):
    settings = {"regularizers": [Reconstruction()], "perceptual": Perceptual(FeatureDistance(clamped_encode), 2.0)}
    bounded = Objective(golden_critic(schedule, 7.5), SDS(), way_back=0.25, **settings)
    plain = Objective(golden_critic(schedule, 7.5), SDS(), bound=None, **settings)
    images, frozen = golden("images")[0] * 2.5, golden("frozen")[0]
    generator = torch.Generator().manual_seed(0)
    draws = plain.draw(golden_encode(images), 0, 10, generator)
    told = {"step": 0, "steps": 10, "draws": draws}
    found, _ = bounded.image_gradient(images, frozen, clamped_encode, **told)
    # torch's clamp passes gradients at its very ends, so the gradient of what is shown is known without the bound.
    shown, _ = plain.image_gradient(images.clamp(-1, 1), frozen, clamped_encode, **told)
    beyond, outward = images.abs() > 1, shown * images.sign() < 0
    assert 0.1 < beyond.float().mean() < 0.9 and bool((beyond & outward).any()) and bool((beyond & ~outward).any())
    assert torch.equal(found, torch.where(beyond, torch.where(outward, 0.0, 0.25 * shown), shown))
    stopped, _ = plain.image_gradient(images, frozen, clamped_encode, **told)
    assert not bool(stopped[beyond].any()) and bool(found[beyond].any())


def test_an_image_that_is_black_throughout_learns_again(gaussian, mean, schedule):
    """A critic that wants grey, and pixels far below black: the encoder's own clamp never lets them go."""

    def encode(images):
        return F.avg_pool2d(images.clamp(-1, 1), 4)

    critic = Critic.cfg(gaussian, mean(0.25, 0.25, 0.25), mean(0.25, 0.25, 0.25), 1.0, schedule=schedule)
    for bound, level in ((None, -3.0), (1.0, 0.25)):  # Adam makes the share that is left as strong as the whole
        images = torch.full((1, 3, 8, 8), -3.0, requires_grad=True)
        optimizer = torch.optim.Adam([images], lr=0.1, betas=(0.5, 0.9))
        objective = Objective(critic, SDS(), bound=bound)
        for step in range(150):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            objective.backward(images * 1.0, None, encode, step=step, steps=150, generator=generator)
            optimizer.step()
        assert float(images.detach().mean()) == pytest.approx(level, abs=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# The default mode


@pytest.mark.parametrize("kind", [1, 2])
def test_shared_noise_has_the_expectation_of_separate_noises(schedule, kind):
    """1,000 draws each, clamps off: the means differ by no more than their standard errors say."""
    draws = 1000
    image, reference = golden("images")[0, :, :, :12, :12], golden("frozen")[0, :, :, :12, :12]
    images, frozen = (one.expand(draws, -1, -1, -1) for one in (image, reference))
    found = {}
    for seed, mode in enumerate(("shared", "sgf")):
        objective = Objective(golden_critic(schedule, 7.5), SDS(), regularizer(kind, False, 3.0), mode=mode)
        generator = torch.Generator().manual_seed(seed)
        gradient, _ = objective.image_gradient(images, frozen, golden_encode, step=0, steps=10, generator=generator)
        found[mode] = gradient.double().flatten(1) * draws  # per draw
    means = {mode: one.mean(0) for mode, one in found.items()}
    variance = sum(one.var(0) / draws for one in found.values())
    excess = ((means["shared"] - means["sgf"]).square() / variance).mean()
    assert 0.4 < excess < 1.7
    # The test has power: leaving a term out, or halving it, would stand out.
    assert (means["sgf"].square() / variance).mean() > 20
    objective = Objective(golden_critic(schedule, 7.5), SDS(), regularizer(kind, False, 1.5))
    halved, _ = objective.image_gradient(
        images, frozen, golden_encode, step=0, steps=10, generator=torch.Generator().manual_seed(2)
    )
    assert ((halved.double().flatten(1).mean(0) * draws - means["sgf"]).square() / variance).mean() > 3


@pytest.mark.parametrize(
    ("mode", "regularizers", "samples"),
    [("shared", 0, 2), ("sgf", 0, 2), ("shared", 1, 4), ("sgf", 1, 6), ("shared", 2, 2), ("sgf", 2, 4)],
)
def test_a_step_is_one_call_and_one_encode_with_a_graph(schedule, mode, regularizers, samples):
    graphs = []

    def encode(images):
        graphs.append(images.requires_grad and torch.is_grad_enabled())
        return golden_encode(images)

    objective = Objective(golden_critic(schedule, 7.5), SDS(), regularizer(regularizers, False, 1.0), mode=mode)
    images = golden("images")[0].requires_grad_()
    objective.backward(images * 1.0, golden("frozen")[0], encode, step=0, steps=10)
    assert objective.needs_frozen == bool(regularizers)
    assert graphs == ([True, False] if regularizers else [True])
    assert (objective.critic.calls, objective.critic.samples) == (1, samples)


def test_a_weight_of_zero_switches_a_regularizer_off(schedule):
    critic = golden_critic(schedule, 7.5)
    off = Objective(critic, SDS(), [Directional(0.0), Reconstruction(0.0)], perceptual=Perceptual(None, weight=0.0))
    plain = Objective(critic, SDS())
    images = golden("images")[0]
    results = [
        one.image_gradient(images, None, golden_encode, step=0, steps=1, generator=torch.Generator().manual_seed(5))[0]
        for one in (off, plain)
    ]
    assert not off.needs_frozen and torch.equal(*results)


def test_the_gradient_is_the_mean_over_the_batch(schedule):
    objective = Objective(
        golden_critic(schedule, 7.5),
        SDS(normalize=True),
        [Directional(normalize=True), Reconstruction()],
        latent_clamp=1.0,
        image_quantile=0.9,
        perceptual=Perceptual(FeatureDistance(golden_encode), 1e-3),
    )
    images, frozen = golden("images")[:, 0], golden("frozen")[:, 0]
    t, noise = torch.tensor([20, 300, 450]), golden("noise3")[:1].repeat(3, 1, 1, 1) * torch.randn(3, 4, 1, 1)
    names = ("sds", "directional", "reconstruction")

    def run(rows):
        shared = noise[rows]
        draws = Draws(t[rows], dict.fromkeys(names, shared))
        return objective.image_gradient(images[rows], frozen[rows], golden_encode, step=0, steps=1, draws=draws)[0]

    together = run([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row] * 3, run([row])[0], rtol=1e-3, atol=1e-5)


def test_gradients_reach_the_generator_and_the_report_says_what_happened(schedule):
    weights = torch.nn.Parameter(golden("images")[:2, 0].clone())
    objective = Objective(
        golden_critic(schedule, 100.0),
        SDS(),
        [Reconstruction()],
        latent_clamp=1.0,
        image_quantile=0.95,
        timesteps=Timesteps(100, 400),
    )
    generator = torch.Generator().manual_seed(0)
    frozen = golden("frozen")[:2, 0]
    report = objective.backward(weights * 0.5, frozen, golden_encode, step=3, steps=10, generator=generator)
    assert report.loss.keys() == {"sds", "reconstruction"}
    assert report.gradient_norm.keys() == report.clamped.keys() == {"sds", "reconstruction", "image"}
    assert 0.1 < report.clamped["sds"] < 1 and report.clamped["reconstruction"] == 0
    assert 0.03 < report.clamped["image"] < 0.07
    assert len(report.timesteps) == 2 and all(100 <= t <= 400 for t in report.timesteps)
    assert float(weights.grad.norm()) == pytest.approx(report.gradient_norm["image"] * 0.5, rel=1e-5)


def test_all_reported_norms_are_of_the_mean_over_the_batch(schedule, gaussian, mean):
    """An encoder that only moves values leaves a norm as it is, so the method's alone is the image's."""
    critic = Critic.cfg(gaussian, mean(0.0), mean(1.0), 7.5, schedule=schedule)
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    gradient, report = Objective(critic, SDS(), bound=None).image_gradient(
        images, None, lambda x: F.pixel_unshuffle(x, 2), step=0, steps=1, generator=generator
    )
    assert report.gradient_norm["sds"] == pytest.approx(report.gradient_norm["image"], rel=1e-5)
    assert report.gradient_norm["image"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_the_encoders_graph_is_gone_before_the_perceptual_network_runs(schedule):
    class Token:
        """Lives as long as the encoder's graph."""

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.token = Token()
            alive.append(weakref.ref(ctx.token))
            return z.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def distance(images, frozen):
        seen.append([token() is not None for token in alive])
        return (images - frozen).square().mean((1, 2, 3))

    for mode in ("shared", "sgf"):
        alive, seen = [], []
        objective = Objective(
            golden_critic(schedule, 7.5),
            SDS(),
            [Reconstruction()],
            mode=mode,
            image_quantile=0.95,
            perceptual=Perceptual(distance),
        )
        objective.image_gradient(
            golden("images")[0], golden("frozen")[0], lambda x: Keep.apply(golden_encode(x.half())), step=0, steps=1
        )
        assert len(alive) == 2 and seen == [[False, False]]


@pytest.mark.parametrize("mode", ["shared", "sgf"])
@pytest.mark.parametrize("side", [16, JUDGED_PX, 32])
def test_equal_generators_are_perceived_as_equal(schedule, mode, side):
    """Whatever lies beyond the range, and at whatever size they are judged: loss and gradient are exactly 0."""
    images, seen = golden("images")[0] * 2.5, []

    def distance(one, other):
        seen.extend((one.detach(), other))
        return FeatureDistance(golden_encode)(one, other)

    gradients = {}
    for name, perceptual in (("with", Perceptual(distance)), ("without", None)):
        objective = Objective(golden_critic(schedule, 7.5), SDS(), mode=mode, perceptual=perceptual)
        randomness = torch.Generator().manual_seed(0)
        gradients[name], report = objective.image_gradient(
            images, images.clone(), ImageEncoder(golden_encode, side), step=0, steps=1, generator=randomness
        )
        assert report.loss.get("perceptual", 0.0) == 0.0
    assert torch.equal(gradients["with"], gradients["without"])
    assert len(seen) == 2 and all(one.shape[-1] == side and float(one.abs().max()) == 1.0 for one in seen)


def test_perceptual_distance_adds_its_own_gradient(schedule):
    images, frozen = golden("images")[:2, 0], golden("frozen")[:2, 0]
    perceptual = Perceptual(FeatureDistance(golden_encode), weight=0.3)
    results = {}
    for name, extra in (("with", perceptual), ("without", None)):
        objective = Objective(golden_critic(schedule, 7.5), SDS(), perceptual=extra, image_quantile=0.95)
        generator = torch.Generator().manual_seed(0)
        results[name], report = objective.image_gradient(
            images, frozen, golden_encode, step=0, steps=1, generator=generator
        )
        assert ("perceptual" in report.loss) == (extra is not None)
    leaf = images.clone().requires_grad_()
    (2000 * 0.3 * perceptual.distance(leaf, frozen).mean()).backward()
    torch.testing.assert_close(results["with"] - results["without"], leaf.grad, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e3, 1.0, 1e-7])
def test_injection_in_half_precision_keeps_gradients(relative_error, dtype, size):
    images = golden("images")[0]
    gradient = golden("noise0")[:1] * size

    def run(of):
        leaf = images.clone().requires_grad_()
        return inject(golden_encode(leaf.to(of)), gradient, leaf)

    exact = run(torch.float32)
    limit = 2e-3 if dtype == torch.float16 else 2e-2
    assert relative_error(run(dtype) / size, exact / size) < limit


def test_the_customary_form_loses_what_injection_keeps(relative_error):
    """(z - (z - gradient).detach())^2 / 2 in float16, for the record of why it is not used."""
    images, gradient = golden("images")[0], golden("noise0")[:1] * 1e-4
    leaf = images.clone().requires_grad_()
    z = golden_encode(leaf.half())
    (0.5 * (z - (z - gradient.half()).detach()).square().sum()).backward()
    exact = images.clone().requires_grad_()
    expected = inject(golden_encode(exact), gradient, exact)
    assert relative_error(leaf.grad / 1e-4, expected / 1e-4) > 0.2
    again = images.clone().requires_grad_()
    assert relative_error(inject(golden_encode(again.half()), gradient, again) / 1e-4, expected / 1e-4) < 2e-3


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_half_precision_models_stay_near_float32(schedule, relative_error, dtype, limit, kind):
    images, frozen = golden("images")[:, 0], golden("frozen")[:, 0]
    results = []
    for precision in (torch.float32, dtype):
        objective = Objective(golden_critic(schedule, 7.5, precision), SDS(), regularizer(kind, False, 1.0))
        leaf = images.clone().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        objective.backward(
            leaf * 1.0, frozen, lambda x, p=precision: golden_encode(x.to(p)), step=0, steps=1, generator=generator
        )
        results.append(leaf.grad)
    assert relative_error(results[1] * 100, results[0] * 100) < limit


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_gradient_that_is_not_finite_is_refused_before_anything_is_injected(schedule, encode):
    def broken(x, sigma):
        return x / 0.0

    objective = Objective(Critic.cfg(broken, None, None, 1.0, schedule=schedule), SDS(), timesteps=Timesteps(77, 77))
    weights = torch.nn.Parameter(torch.ones(1, 3, 8, 8))
    with pytest.raises(NotFinite, match=r"gradient of sds .* timesteps \[77\]"):
        objective.backward(weights * 1.0, None, encode, step=0, steps=1)
    fine = Objective(golden_critic(schedule, 7.5), SDS())
    with pytest.raises(NotFinite, match="image gradient"):
        fine.backward(weights * 1.0, None, lambda x: encode(x) + (x[:, :1, ::4, ::4] - 1).sqrt(), step=0, steps=1)
    assert weights.grad is None


def test_what_cannot_work_is_refused(schedule, encode, gaussian, mean):
    critic = golden_critic(schedule, 7.5)
    for settings, message in (
        (dict(mode="both"), "shared, sgf, got 'both'"),
        (dict(weighting="none"), "got 'none'"),
        (dict(latent_clamp=0.0), "latent_clamp to be above 0"),
        (dict(image_quantile=1.5), "image_quantile"),
        (dict(image_quantile=0.0), "image_quantile to be above 0"),
        (dict(bound=0.0), "bound to be finite and above 0"),
        (dict(bound=1.0, way_back=1.5), "way_back to be 0 to 1"),
        (dict(regularizers=[Directional(), Directional(0.5)]), "each regularizer once"),
        (dict(regularizers=[Directional(float("nan"))]), "weight of directional to be finite"),
        (dict(timesteps=Timesteps(10, 1000)), "t_max below 1000"),
        (dict(method=NFSD()), "what images should not be.*for the method nfsd"),
        (dict(method=DDS()), "generator makes now, for the method dds"),
        (dict(method=SDSBridge()), "generator makes now, for the method bridge"),
    ):
        with pytest.raises(GuidanceError, match=message):
            Objective(**{"critic": critic, "method": SDS(), **settings})
    objective = Objective(critic, SDS(), [Directional()])
    images = torch.zeros(1, 3, 8, 8, requires_grad=True)
    for made, frozen, message in (
        (images.detach(), images.detach(), "images without one"),
        (images * 1, None, "frozen generator's images"),
        (images * 1, torch.zeros(1, 3, 4, 4), r"shape \[1, 3, 8, 8\], got \[1, 3, 4, 4\]"),
    ):
        with pytest.raises(GuidanceError, match=message):
            objective.backward(made, frozen, encode, step=0, steps=1)
    state = objective.state_dict()
    objective.load_state_dict(state)
    with pytest.raises(GuidanceError, match="method sds, got that of csd"):
        objective.load_state_dict({"method": "csd", "state": {}})


def test_steps_repeat_with_the_same_generator(schedule):
    objective = Objective(golden_critic(schedule, 7.5), SDS(), [Directional()], mode="sgf")
    images, frozen = golden("images")[0], golden("frozen")[0]
    results = [
        objective.image_gradient(
            images, frozen, golden_encode, step=0, steps=1, generator=torch.Generator().manual_seed(seed)
        )[0]
        for seed in (4, 4, 5)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
