"""Every method's gradient against closed forms on Gaussian scores, where the true answer is known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from indomain_guidance.guidance.distillation.context import Context
from indomain_guidance.guidance.distillation.critic import Critic, Request
from indomain_guidance.guidance.distillation.csd import CSD
from indomain_guidance.guidance.distillation.ism import ISM
from indomain_guidance.guidance.distillation.method import Method, prompts_of
from indomain_guidance.guidance.distillation.methods import METHODS, make_method, methods_with
from indomain_guidance.guidance.distillation.nfsd import NFSD
from indomain_guidance.guidance.distillation.normalize import normalize
from indomain_guidance.guidance.distillation.objective import Draws, Objective
from indomain_guidance.guidance.distillation.sds import SDS
from indomain_guidance.guidance.distillation.timesteps import Timesteps
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.options import option, options_of

# The means of the Gaussians that stand for the empty, wanted, unwanted and source prompts; the guidance scale.
U, C, NEGATIVE, SOURCE, SCALE = -0.5, 1.0, 2.0, 0.25, 7.5
T = torch.tensor([20, 199, 200, 600])


class Case:
    """Latents, noise and each method's terms in float64, from one Gaussian critic."""

    def __init__(self, gaussian, schedule, mean) -> None:
        self.gaussian, self.schedule = gaussian, schedule
        one = [mean(*[value] * 4) for value in (U, C, NEGATIVE, SOURCE)]
        self.critic = Critic.cfg(gaussian, one[0], one[1], SCALE, schedule=schedule, unwanted=one[2], source=one[3])
        generator = torch.Generator().manual_seed(0)
        self.z, self.frozen, self.noise = torch.randn(3, 4, 4, 2, 2, generator=generator)
        self.sigma = schedule.sigmas[T].double().reshape(-1, 1, 1, 1)
        self.factor = gaussian.factor(self.sigma)
        self.x = self.z.double() + self.sigma * self.noise.double()
        self.x_frozen = self.frozen.double() + self.sigma * self.noise.double()

    def e(self, mu: float, x: torch.Tensor | None = None) -> torch.Tensor:
        """The noise prediction for the Gaussian with the mean mu, such as U or C, on x (the noisy z unless given)."""
        return self.factor * ((self.x if x is None else x) - mu)

    def gradient(self, method, step: int = 0, steps: int = 1) -> torch.Tensor:
        """What the method's `gradient` gives for each sample: w(t) is 1 and the encoder the identity.

        The objective means over the batch; the factor len(T) takes that back.
        """
        objective = Objective(self.critic, method, weighting="uniform", timesteps=Timesteps(0, 999), bound=None)
        frozen = self.frozen if objective.needs_frozen else None
        draws = Draws(T, {method.name: self.noise})
        gradient, _ = objective.image_gradient(self.z, frozen, lambda x: x * 1.0, step=step, steps=steps, draws=draws)
        return gradient * len(T)


@pytest.fixture
def case(gaussian, schedule, mean):
    return Case(gaussian, schedule, mean)


def close(own: torch.Tensor, expected: torch.Tensor, atol: float = 2e-4) -> None:
    torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=atol)


def test_sds(case):
    guided = case.e(U) + SCALE * (case.e(C) - case.e(U))
    close(case.gradient(SDS()), guided - case.noise)
    close(case.gradient(SDS(normalize=True)), normalize(guided) - normalize(case.noise.double()))


def test_csd_is_the_guidance_alone(case):
    close(case.gradient(CSD()), case.factor * (U - C) * torch.ones_like(case.x))
    repelled = case.factor * ((U - C) + 0.5 * (NEGATIVE - U)) * torch.ones_like(case.x)
    annealed = CSD(unwanted_weight=1.0, unwanted_weight_end=0.0)
    close(case.gradient(annealed, step=1, steps=3), repelled)
    close(case.gradient(annealed, step=2, steps=3), case.factor * (U - C) * torch.ones_like(case.x))


def test_nfsd_switches_its_direction_at_the_threshold(case):
    guidance = SCALE * (case.e(C) - case.e(U))
    early = (T < 200).reshape(-1, 1, 1, 1)
    close(case.gradient(NFSD()), torch.where(early, case.e(U), case.e(U) - case.e(NEGATIVE)) + guidance)
    close(case.gradient(NFSD(threshold=0)), case.e(U) - case.e(NEGATIVE) + guidance)


@pytest.mark.parametrize(("threshold", "evaluated"), [(0, 4), (199, 3), (200, 2), (601, 0)])
def test_nfsd_evaluates_the_unwanted_prompt_only_where_it_counts(case, threshold, evaluated):
    found = case.gradient(NFSD(threshold))
    assert case.critic.samples == 2 * len(T) + evaluated and sum(case.gaussian.calls) == case.critic.samples
    late = (threshold <= T).reshape(-1, 1, 1, 1)
    guidance = SCALE * (case.e(C) - case.e(U))
    close(found, case.e(U) - torch.where(late, case.e(NEGATIVE), 0.0) + guidance)


def test_an_opinion_that_was_not_asked_for_is_no_number(case):
    ask = Request(case.z, T, frozenset({"e_unwanted"}), unwanted_from=200)
    (found,) = case.critic.predict_many([ask])
    (whole,) = case.critic.predict_many([Request(case.z, T, frozenset({"e_unwanted"}))])
    assert found.e_unwanted.isnan().all((1, 2, 3)).tolist() == [True, True, False, False]
    torch.testing.assert_close(found.e_unwanted[2:], whole.e_unwanted[2:])


def test_dds_is_the_difference_of_two_sds(case):
    target = case.e(U) + SCALE * (case.e(C) - case.e(U))
    source = case.e(U, case.x_frozen) + SCALE * (case.e(SOURCE, case.x_frozen) - case.e(U, case.x_frozen))
    # The noise cancels: what remains depends on latents and prompts only.
    expected = case.factor * (case.z.double() - case.frozen.double() - SCALE * (C - SOURCE))
    close(target - source, expected)
    close(case.gradient(make_method("dds", case.critic)), expected)


def test_bridge_needs_no_unconditional(case):
    expected = SCALE * case.factor * (SOURCE - C) * torch.ones_like(case.x)
    close(case.gradient(make_method("bridge", case.critic)), expected)


def test_ism_on_a_single_point_does_not_depend_on_the_way(make_gaussian, schedule, mean):
    """Where all data is one point, inversion is exact in any stride and ISM is s (e_c - e_u) at t."""
    case = Case(make_gaussian(0.0), schedule, mean)
    expected = SCALE * (U - C) / case.sigma * torch.ones_like(case.x)
    for method in (ISM(), ISM(interval=1, stride=500)):
        # Euler's rounding grows with sigma_t / sigma_0.
        torch.testing.assert_close(case.gradient(method).double(), expected, rtol=2e-3, atol=2e-3)


def test_ism_against_its_definition_step_by_step(case):
    """The same inversion written in x = z + sigma noise, one sample at a time, in float64."""
    gaussian, sigmas = case.gaussian, case.schedule.sigmas.double()

    def e(x, level, mu):
        return gaussian.factor(sigmas[level]) * (x - mu)

    for interval, stride in ((50, 200), (120, 37)):
        expected = []
        for row, t in enumerate(T.tolist()):
            s, at = max(t - interval, 0), 0
            x = case.z[row].double() + sigmas[0] * case.noise[row].double()
            while at < s:
                following = min(at + stride, s)
                x = x + (sigmas[following] - sigmas[at]) * e(x, at, U)
                at = following
            at_s = e(x, s, U)
            x = x + (sigmas[t] - sigmas[s]) * at_s
            expected.append(e(x, t, U) + SCALE * (e(x, t, C) - e(x, t, U)) - at_s)
        close(case.gradient(ISM(interval, stride)), torch.stack(expected), atol=1e-3)


@pytest.mark.parametrize(("scale", "target"), [(1.0, C), (3.0, U + 3 * (C - U))])
def test_sds_leads_to_the_mode_of_the_guided_distribution(gaussian, schedule, mean, scale, target):
    critic = Critic.cfg(gaussian, mean(*[U] * 4), mean(*[C] * 4), scale, schedule=schedule)
    objective = Objective(critic, SDS(), timesteps=Timesteps(100, 600), bound=None)
    z = torch.zeros(8, 4, 4, 4, requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=4.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        optimizer.zero_grad()
        objective.backward(z * 1.0, None, lambda x: x * 1.0, step=step, steps=120, generator=generator)
        optimizer.step()
    assert float(z.detach().mean()) == pytest.approx(target, abs=0.05)


@dataclass
class Towards(Method):
    """A toy method with an option, without a critic's opinion: the way to a value."""

    value: float = option(0.0, "where latents should be", min=-10.0, max=10.0)

    name = "towards"

    def gradient(self, context: Context) -> torch.Tensor:
        return context.z - self.value


def test_a_method_of_ones_own_needs_a_name_and_a_gradient(case):
    close(case.gradient(Towards(2.0)), case.z.double() - 2.0)
    assert [one.name for one in options_of(Towards)] == ["value"] and not prompts_of(Towards)
    with pytest.raises(GuidanceError, match="passes the encoder, got towards"):
        Objective(case.critic, type("Pixels", (Towards,), {"through_encoder": False})())


def test_methods_say_what_they_need():
    needs = {name: set(prompts_of(method)) for name, method in METHODS.items()}
    assert needs["nfsd"] == {"unwanted"} and needs["dds"] == needs["bridge"] == {"source"}
    assert needs["sds"] == needs["csd"] == set() and prompts_of(CSD(unwanted_weight=1.0)) == {"unwanted"}
    assert methods_with("source").startswith("dds, bridge") and methods_with("unwanted").startswith("nfsd")
    assert METHODS["vsd"].learns and not METHODS["sds"].learns
    assert METHODS["dds"].compares_with_frozen() and not METHODS["sds"].compares_with_frozen()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_options_have_help_and_defaults_in_their_range(method):
    for one in options_of(method):
        about = one.metadata
        assert one.type in ("bool", "int", "float", "str") and not about["help"].endswith(".")
        assert one.type not in ("int", "float") or about["min"] <= one.default <= about["max"]
        assert one.type != "str" or one.default in about["choices"]


def test_methods_by_name(case):
    assert list(METHODS)[:7] == ["sds", "csd", "nfsd", "dds", "bridge", "ism", "vsd"]
    assert make_method("ism", case.critic, interval=80) == ISM(interval=80)
    with pytest.raises(GuidanceError, match="got 'sjc'"):
        make_method("sjc", case.critic)
    with pytest.raises(GuidanceError, match="options of the method sds"):
        make_method("sds", case.critic, interval=80)
    with pytest.raises(GuidanceError, match="network of its critic"):
        make_method("vsd", case.critic)
    for wrong in (dict(interval=0), dict(stride=0)):
        with pytest.raises(GuidanceError, match="at least 1 timestep"):
            ISM(**wrong)
