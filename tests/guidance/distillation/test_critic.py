"""The critic's noise predictions against exact scores, and what a step costs."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.combination import Guidance
from indomain_guidance.guidance.diffusion import Denoiser
from indomain_guidance.guidance.distillation.critic import Critic, Request
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.presets import in_domain
from indomain_guidance.guidance.schedules import Interval
from indomain_guidance.guidance.terms import Source, Term

U, C = (0.0, 0.5, -1.0, 2.0), (1.0, -1.0, 0.0, 2.5)


def latents(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


def exact(gaussian, schedule, z_t, t, mu) -> torch.Tensor:
    """eps of N(mu, spread^2) at z_t, in float64: sqrt(1 - abar) (z_t - sqrt(abar) mu) / (abar spread^2 + 1 - abar)."""
    abar = schedule.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    mu = torch.as_tensor(mu, dtype=torch.float64).reshape(1, -1, 1, 1)
    return (1 - abar).sqrt() * (z_t.double() - abar.sqrt() * mu) / (abar * gaussian.spread**2 + 1 - abar)


def test_opinions_of_plain_guidance_are_the_exact_scores(gaussian, schedule, mean):
    critic = Critic.cfg(gaussian, mean(*U), mean(*C), 100.0, schedule=schedule, unwanted=mean(1, 1, 1, 1))
    z_t, t = latents(5), torch.tensor([0, 10, 250, 500, 999])
    found = critic.predict(z_t, t, ("e", "e_u", "e_c", "e_unwanted"))
    e_u, e_c = exact(gaussian, schedule, z_t, t, U), exact(gaussian, schedule, z_t, t, C)
    # At timestep 0, sigma is 0.03 and rounding of the latents is magnified most.
    for own, expected, tolerance in (
        (found.e_u, e_u, 2e-5),
        (found.e_c, e_c, 2e-5),
        (found.e, e_u + 100 * (e_c - e_u), 2e-3),
        (found.e_unwanted, exact(gaussian, schedule, z_t, t, (1, 1, 1, 1)), 2e-5),
    ):
        torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=tolerance)
    assert found.scale.flatten().tolist() == [100.0] * 5
    assert gaussian.calls == [15] and (critic.calls, critic.samples) == (1, 15)


def test_several_questions_share_one_call_and_are_evaluated_once(gaussian, schedule, mean):
    critic = Critic.cfg(gaussian, mean(*U), mean(*C), 7.5, schedule=schedule, source=mean(3, 3, 3, 3))
    first, second, t = latents(2, 1), latents(2, 2), torch.tensor([100, 400])
    asks = [
        Request(first, t, frozenset({"e", "e_u", "e_c"})),
        Request(second, t, frozenset({"e_source", "e_source_c"})),
    ]
    together = critic.predict_many(asks)
    assert gaussian.calls == [8]  # two conditionings for each of four latents
    for ask, answer in zip(asks, together):
        alone = critic.predict(ask.z_t, ask.t, ask.needs)
        for name in ask.needs:
            torch.testing.assert_close(getattr(answer, name), getattr(alone, name), rtol=1e-5, atol=1e-5)
    expected = exact(gaussian, schedule, second, t, (3, 3, 3, 3))
    torch.testing.assert_close(together[1].e_source_c.double(), expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_needed_is_evaluated(gaussian, schedule, mean):
    critic = Critic.cfg(gaussian, mean(*U), mean(*C), 1.0, schedule=schedule)
    z_t, t = latents(3), torch.tensor([10, 20, 30])
    critic.predict(z_t, t, ("e",))  # scale 1: no base
    critic.predict(z_t, t, ("e_u",))
    assert gaussian.calls == [3, 3]


def test_a_domain_model_and_intervals_per_sample(make_gaussian, schedule, mean):
    prior, domain = make_gaussian(0.5), make_gaussian(0.2)
    uncond, cond = mean(*U), mean(*C)
    below = Interval(2.0, start=schedule.sigma(400), end=0.0, unit="sigma")
    critic = Critic(in_domain(prior, domain, uncond, cond, below, 3.0), schedule)
    z_t, t = latents(4), torch.tensor([100, 700, 300, 900])
    found = critic.predict(z_t, t)
    e_u, e_c = exact(prior, schedule, z_t, t, U), exact(prior, schedule, z_t, t, C)
    e_d = exact(domain, schedule, z_t, t, U)
    weight = torch.tensor([2.0, 0.0, 2.0, 0.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    guided = e_u + weight * (e_d - e_u) + 3 * (e_c - e_u)
    torch.testing.assert_close(found.e.double(), guided, rtol=1e-4, atol=1e-4)
    as_one_cfg = found.e_u + found.scale * (found.e_c - found.e_u)
    torch.testing.assert_close(as_one_cfg.double(), guided, rtol=1e-4, atol=1e-4)
    assert found.scale.flatten().tolist() == [5.0, 3.0, 5.0, 3.0]
    assert prior.calls == [8] and domain.calls == [2]


def test_samples_that_combine_alike_may_differ_in_scale(gaussian, schedule, mean):
    """A term on the base's own conditioning adds nothing to e but to the sum of weights."""
    base, level = mean(*U), Interval(2.0, start=schedule.sigma(400), end=0.0, unit="sigma")
    terms = [Term("nothing", gaussian, base, level), Term("control", gaussian, mean(*C), 3.0)]
    critic = Critic(Guidance(Source(gaussian, base), terms), schedule)
    found = critic.predict(latents(3), torch.tensor([100, 700, 300]))
    assert found.scale.flatten().tolist() == [5.0, 3.0, 5.0]
    torch.testing.assert_close(found.e_u + found.scale * (found.e_c - found.e_u), found.e, rtol=1e-4, atol=1e-4)


def test_a_conditioning_per_latent_follows_its_rows(gaussian, schedule):
    per_image = {"mu": torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 4, 1, 1).contiguous()}
    base = {"mu": torch.zeros(1, 4, 1, 1)}
    level = Interval(2.0, start=schedule.sigma(400), end=0.0, unit="sigma")
    critic = Critic(Guidance(Source(gaussian, base), [Term("control", gaussian, per_image, level)]), schedule)
    z_t, t = latents(4), torch.tensor([700, 100, 800, 200])
    found = critic.predict(z_t, t, ("e",)).e
    for row, mu in ((0, 0.0), (1, 2.0), (2, 0.0), (3, 6.0)):
        expected = exact(gaussian, schedule, z_t[row : row + 1], t[row : row + 1], [mu] * 4)
        torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-4, atol=1e-5)
    assert gaussian.calls == [6]


def test_a_model_may_batch_its_own_conditionings(gaussian, schedule, mean):
    class Own:
        def __call__(self, x, sigma, **cond):
            raise AssertionError("never called one by one")

        def denoise_many(self, jobs):
            self.jobs = len(jobs)
            return [gaussian(x, sigma, mean(*arguments["means"])["mu"]) for x, sigma, arguments in jobs]

    model = Own()
    critic = Critic.cfg(model, {"means": list(U)}, {"means": list(C)}, 7.5, schedule=schedule)
    z_t, t = latents(2), torch.tensor([50, 60])
    expected = Critic.cfg(gaussian, mean(*U), mean(*C), 7.5, schedule=schedule).predict(z_t, t)
    torch.testing.assert_close(critic.predict(z_t, t).e, expected.e)
    assert model.jobs == 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_noise_prediction_of_a_network_is_its_own_output(schedule, prediction_type):
    def unet(x, timesteps):
        return torch.sin(x) + timesteps.reshape(-1, 1, 1, 1) / 1000

    critic = Critic.cfg(Denoiser(unet, schedule, prediction_type), None, None, 1.0)
    z_t, t = latents(3), torch.tensor([10, 300, 900])
    output, abar = unet(z_t, t), schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    expected = {
        "epsilon": output,
        "v_prediction": abar.sqrt() * output + (1 - abar).sqrt() * z_t,
        "sample": (z_t - abar.sqrt() * output) / (1 - abar).sqrt(),
    }[prediction_type]
    torch.testing.assert_close(critic.predict(z_t, t, ("e",)).e, expected, rtol=1e-5, atol=1e-5)
    source = critic.guidance.terms[0].source
    torch.testing.assert_close(critic.noise_prediction(source, z_t, t), expected, rtol=1e-5, atol=1e-5)


def test_a_prediction_that_nobody_asked_for_says_how_to_ask(gaussian, schedule, mean):
    found = Critic.cfg(gaussian, mean(*U), mean(*C), schedule=schedule).predict(
        latents(2), torch.tensor([5, 6]), ("e",)
    )
    assert not hasattr(found, "noise")
    with pytest.raises(GuidanceError, match="Expected the prediction e_u.*`needs`"):
        found.e_u  # noqa: B018


def test_what_does_not_fit_is_refused(gaussian, schedule, mean):
    critic = Critic.cfg(gaussian, mean(*U), mean(*C), 7.5, schedule=schedule)
    z_t, t = latents(2), torch.tensor([5, 6])
    for wrong, message in (
        (dict(t=torch.tensor([5, 1000])), "timesteps from 0 to 999, got others"),
        (dict(t=torch.tensor([5])), "one timestep for each of 2 latents, got 1"),
        (dict(needs=("e_unwanted",)), "what images should not be.*`unwanted`"),
        (dict(needs=("e_source",)), "what the generator makes now.*`source`"),
        (dict(needs=("noise",)), "got 'noise'"),
    ):
        with pytest.raises(GuidanceError, match=message):
            critic.predict(z_t, wrong.get("t", t), wrong.get("needs", ("e",)))
    with pytest.raises(GuidanceError, match="NoiseSchedule, got NoneType"):
        Critic.cfg(gaussian, mean(*U), mean(*C))
    with pytest.raises(GuidanceError, match="dict or None"):
        Critic.cfg(gaussian, [mean(*U)], mean(*C), schedule=schedule)
    shrinks = Critic.cfg(lambda x, sigma, mu: x[:, :1], mean(*U), mean(*C), schedule=schedule)
    with pytest.raises(GuidanceError, match="to return the shape"):
        shrinks.predict(z_t, t)
