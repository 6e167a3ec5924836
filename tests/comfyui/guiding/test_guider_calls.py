"""More conditionings than two on one model, under everything that may know two: patches, wrappers, caches.

The oracle is the formula, D_u + sum w_i (D_i - D_u), each prediction core's own for that conditioning as a positive on
the model as it is patched. What remembers is asked twice, so that an answer remembered of another prompt would show.
"""

from __future__ import annotations

import collections
import importlib

import pytest
import torch

from ..conftest import Tiny

pytestmark = pytest.mark.slow

SIGMA = 2.0
WEIGHTS = {"a": 1.0, "b": -0.7, "c": 2.0}


def noisy(seed: int = 1, batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed)) * 3.0


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


# ---- what may be on a model -----------------------------------------------------------------------------------------
# Each takes a MODEL and patches it anew; `reset` is what a method would do at the start of a run.


def strength(index: int) -> float:
    """What a method does to the positive and to the negative; there is nothing else that it could do something to."""
    return {0: 0.6, 1: 1.2}[index]


def per_image(extra: dict, tensor: torch.Tensor) -> torch.Tensor:
    chunks = tensor.chunk(len(extra["cond_or_uncond"]))
    return torch.cat([strength(index) * chunk for index, chunk in zip(extra["cond_or_uncond"], chunks)])


def attention_patch(comfyui, model):
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, per_image(extra_options, v)))


def attention_replacement(comfyui, model):
    # As IPAdapters do: one embedding for the positive, one for the negative.
    def replace(q, k, v, extra_options):
        out = comfyui.attention.optimized_attention(q, k, v, extra_options["n_heads"])
        return per_image(extra_options, out)

    model.set_model_attn2_replace(replace, "middle", 0)


def output_block_patch(comfyui, model):
    model.set_model_output_block_patch(lambda h, skip, options: (per_image(options, h), skip))


def function_wrapper(comfyui, model):
    model.set_model_unet_function_wrapper(
        lambda run, a: per_image({"cond_or_uncond": a["cond_or_uncond"]}, run(a["input"], a["timestep"], **a["c"]))
    )


def options_of(args, kwargs) -> dict:
    return next(value for value in [*kwargs.values(), *args] if isinstance(value, dict) and "cond_or_uncond" in value)


def apply_model_wrapper(comfyui, model):
    def wrapper(executor, *args, **kwargs):
        return per_image(options_of(args, kwargs), executor(*args, **kwargs))

    model.add_wrapper_with_key(comfyui.patcher_extension.WrappersMP.APPLY_MODEL, "some pack", wrapper)


def diffusion_model_wrapper(comfyui, model):
    def wrapper(executor, *args, **kwargs):
        return per_image(options_of(args, kwargs), executor(*args, **kwargs))

    model.add_wrapper(comfyui.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)


def calc_cond_batch_wrapper(comfyui, model):
    def wrapper(executor, ran, conds, *args, **kwargs):
        first, second = conds
        one, other = executor(ran, [first, second], *args, **kwargs)
        return [0.6 * one, 1.2 * other]

    model.add_wrapper(comfyui.patcher_extension.WrappersMP.CALC_COND_BATCH, wrapper)


def replaced_forward(comfyui, model):
    forward = model.model.diffusion_model.forward

    def wrapped(x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **more):  # noqa: B006
        out = forward(x, timesteps, context, y, control, transformer_options, **more)
        return per_image(transformer_options, out)

    model.add_object_patch("diffusion_model.forward", wrapped)


def replaced_block(comfyui, model):
    block = "middle_block.1.transformer_blocks.0"
    forward = model.model.diffusion_model.get_submodule(block).forward

    def wrapped(x, context=None, transformer_options={}):  # noqa: B006
        return per_image(transformer_options, forward(x, context, transformer_options))

    model.add_object_patch(f"diffusion_model.{block}.forward", wrapped)


def attention_override(comfyui, model):
    def override(attend, *args, **kwargs):
        return per_image(kwargs["transformer_options"], attend(*args, **kwargs))

    model.model_options["transformer_options"]["optimized_attention_override"] = override


STATELESS = [
    attention_patch,
    attention_replacement,
    output_block_patch,
    function_wrapper,
    apply_model_wrapper,
    diffusion_model_wrapper,
    calc_cond_batch_wrapper,
    replaced_forward,
    replaced_block,
    attention_override,
]


def cached_by_index(comfyui, model):
    # TeaCache, TGate: what each of the two gave last time.
    cache: dict[int, torch.Tensor] = {}

    def wrapper(run, a):
        out = None
        pieces = []
        for number, index in enumerate(a["cond_or_uncond"]):
            if index not in cache:
                out = run(a["input"], a["timestep"], **a["c"]) if out is None else out
                cache[index] = out.chunk(len(a["cond_or_uncond"]))[number]
            pieces.append(cache[index])
        return torch.cat(pieces)

    model.set_model_unet_function_wrapper(wrapper)


def cached_in_two_places(comfyui, model):
    cache = [None, None]

    def wrapper(executor, *args, **kwargs):
        indices = options_of(args, kwargs)["cond_or_uncond"]
        if any(cache[index] is None for index in indices):
            for index, chunk in zip(indices, executor(*args, **kwargs).chunk(len(indices))):
                cache[index] = chunk
        return torch.cat([cache[index] for index in indices])

    model.add_wrapper(comfyui.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)


def cached_as_a_whole(comfyui, model):
    # One call a step is all that such a method has ever seen.
    last = None

    def wrapper(executor, *args, **kwargs):
        nonlocal last
        if last is None:
            last = executor(*args, **kwargs)
        return last

    model.add_wrapper(comfyui.patcher_extension.WrappersMP.APPLY_MODEL, wrapper)


class Remembering:
    def __init__(self) -> None:
        self.values = {}

    def __call__(self, q, k, v, extra_options):
        indices = extra_options["cond_or_uncond"]
        chunks = v.chunk(len(indices))
        for index, chunk in zip(indices, chunks):
            self.values.setdefault((index, tuple(chunk.shape), extra_options["block"]), 0.5 * chunk)
        return (
            q,
            k,
            torch.cat([self.values[i, tuple(c.shape), extra_options["block"]] for i, c in zip(indices, chunks)]),
        )


def remembered_by_an_object(comfyui, model):
    model.set_model_attn1_patch(Remembering())


def remembered_by_two_functions(comfyui, model):
    # One patch writes what another reads.
    seen = {}

    def write(q, k, v, extra_options):
        seen.setdefault(extra_options["cond_or_uncond"][0], v.mean())
        return q, k, v

    def read(h, skip, options):
        return h + seen[options["cond_or_uncond"][0]], skip

    model.set_model_attn1_patch(write)
    model.set_model_output_block_patch(read)


def remembered_in_the_options(comfyui, model):
    model.model_options["transformer_options"]["some pack"] = {"cache": {}}

    def patch(q, k, v, extra_options):
        cache = extra_options["some pack"]["cache"]
        for index in extra_options["cond_or_uncond"]:
            cache.setdefault((index, v.shape), v)
        return q, k, cache[extra_options["cond_or_uncond"][0], v.shape]

    model.set_model_attn1_patch(patch)


def answered_from(cache, a, run):
    """As `cached_by_index`, of any kind of cache."""
    indices = a["cond_or_uncond"]
    if any(index not in cache for index in indices):
        for index, chunk in zip(indices, run(a["input"], a["timestep"], **a["c"]).chunk(len(indices))):
            cache.setdefault(index, chunk)
    return torch.cat([cache[index] for index in indices])


class Slots:
    __slots__ = ("cache",)

    def __init__(self) -> None:
        self.cache = {}

    def __call__(self, run, a):
        return answered_from(self.cache, a, run)


def remembered_in_slots(comfyui, model):
    model.set_model_unet_function_wrapper(Slots())


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cache = torch.nn.Linear(2, 2), {}

    def forward(self, run, a):
        return answered_from(self.cache, a, run)


def remembered_by_a_module(comfyui, model):
    model.set_model_unet_function_wrapper(Module())


def remembered_in_a_queue(comfyui, model):
    caches = collections.deque([{}], maxlen=2)
    model.set_model_unet_function_wrapper(lambda run, a: answered_from(caches[-1], a, run))


REMEMBERING = [
    cached_by_index,
    cached_in_two_places,
    cached_as_a_whole,
    remembered_by_an_object,
    remembered_by_two_functions,
    remembered_in_the_options,
    remembered_in_slots,
    remembered_by_a_module,
    remembered_in_a_queue,
]


def patched(comfyui, tiny, kind, seed=0):
    model = tiny.prior(seed).clone()
    kind(comfyui, model)
    return model


@pytest.fixture(scope="module", autouse=True)
def attention(comfyui):
    comfyui.attention = importlib.import_module("comfy.ldm.modules.attention")


# ---- one model, many prompts ----------------------------------------------------------------------------------------


class Twice:
    """Two steps at x and at y, in one run."""

    def __init__(self, comfyui, x, y) -> None:
        self.seen = []
        outer = self

        class Sampler(comfyui.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
                for one in (x, y):
                    outer.seen.append(model_wrap(one, torch.full((x.shape[0],), SIGMA), **extra_args))
                return torch.zeros_like(x)

        self.sampler = Sampler()

    def run(self, guider, x):
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), self.sampler, torch.tensor([SIGMA, SIGMA, 0.0]), seed=0)
        return self.seen


def core_twice(comfyui, model, positive, negative, scale):
    guider = comfyui.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return Twice(comfyui, noisy(1), noisy(2)).run(guider, noisy(1))


def multi(internals, model, base, conds, weights=WEIGHTS):
    terms = [internals.Term(name, None, conds[name], weight) for name, weight in weights.items()]
    return internals.TermGuider(model, base, terms)


@pytest.mark.parametrize("kind", STATELESS + REMEMBERING, ids=lambda kind: kind.__name__)
def test_every_prompt_is_answered_as_core_answers_it_alone(comfyui, tiny: Tiny, internals, kind):
    base, conds = tiny.conditioning(9), {name: tiny.conditioning(i) for i, name in enumerate(WEIGHTS)}
    # A method of its own for each, as in three graphs of core's; cfg 2 so that base and prompt come in core's pair.
    single = {name: core_twice(comfyui, patched(comfyui, tiny, kind), cond, base, 2.0) for name, cond in conds.items()}
    u = core_twice(comfyui, patched(comfyui, tiny, kind), conds["a"], base, 0.0)
    alone = {name: [u[i] + 0.5 * (both[i] - u[i]) for i in range(2)] for name, both in single.items()}
    ours = multi(internals, patched(comfyui, tiny, kind), base, conds)
    found = Twice(comfyui, noisy(1), noisy(2)).run(ours, noisy(1))
    for i in range(2):
        expected = u[i] + sum(weight * (alone[name][i] - u[i]) for name, weight in WEIGHTS.items())
        assert relative(found[i], expected) < 1e-4
    plain = Twice(comfyui, noisy(1), noisy(2)).run(multi(internals, tiny.prior(0), base, conds), noisy(1))
    assert relative(plain[1], found[1]) > 1e-3, "the method must do something for the comparison to mean anything"


# Without `cached_as_a_whole`, which knows no call but the pair's: a base that goes on alone is too much for it, on
# core too.
@pytest.mark.parametrize(
    "kind", [kind for kind in REMEMBERING if kind is not cached_as_a_whole], ids=lambda kind: kind.__name__
)
def test_a_prompt_that_joins_later_remembers_nothing_of_the_first(comfyui, tiny: Tiny, internals, kind):
    base, first, second = (tiny.conditioning(i) for i in (9, 1, 2))
    schedules = importlib.import_module("indomain_guidance.guidance.schedules")
    early = schedules.Interval(2.0, 100.0, 2.0, unit="sigma")
    late = schedules.Interval(2.0, 2.0, 0.0, unit="sigma")

    def two_levels(guider):
        seen = []

        class Sampler(comfyui.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
                for sigma in (3.0, 1.0):
                    seen.append(model_wrap(noisy(), torch.full((2,), sigma), **extra_args))
                return torch.zeros_like(noisy())

        guider.sample(
            torch.zeros_like(noisy()), torch.zeros_like(noisy()), Sampler(), torch.tensor([3.0, 1.0, 0.0]), seed=0
        )
        return seen

    guider = internals.TermGuider(
        patched(comfyui, tiny, kind),
        base,
        [internals.Term("early", None, first, early), internals.Term("late", None, second, late)],
    )
    found = two_levels(guider)
    # What core makes of the second prompt alone, fresh at that level; the base is remembered from before.
    fresh = patched(comfyui, tiny, kind)
    alone = tiny.denoised(fresh, second, noisy(), 1.0)
    core = comfyui.samplers.CFGGuider(patched(comfyui, tiny, kind))
    core.set_conds(first, base)
    core.set_cfg(0.0)
    u = two_levels(core)[1]
    assert relative(found[1], u + 2.0 * (alone - u)) < 1e-4


def test_a_method_that_remembers_on_the_model_is_refused_by_name(comfyui, tiny, internals):
    def wrapper(executor, *args, **kwargs):
        network = executor.class_obj
        state = network.__dict__.setdefault("_teacache_state", {})
        indices = options_of(args, kwargs)["cond_or_uncond"]
        if any(index not in state for index in indices):
            for index, chunk in zip(indices, executor(*args, **kwargs).chunk(len(indices))):
                state[index] = chunk
        return torch.cat([state[index] for index in indices])

    prior = tiny.prior(0)
    prior.add_wrapper_with_key(comfyui.patcher_extension.WrappersMP.DIFFUSION_MODEL, "teacache", wrapper)
    base, conds = tiny.conditioning(9), {name: tiny.conditioning(i) for i, name in enumerate(WEIGHTS)}
    with pytest.raises(
        ValueError, match="found teacache on the prior, which would mix up its 4 conditionings"
    ) as problem:
        tiny.predict(multi(internals, prior, base, conds), noisy(), SIGMA)
    assert "\n" not in str(problem.value)
    # Two are what it was made for; what they left behind is none of the next run's.
    tiny.predict(multi(internals, prior, base, conds, {"a": 2.0}), noisy(), SIGMA)
    with pytest.raises(ValueError, match="found teacache on the prior"):
        tiny.predict(multi(internals, prior, base, conds), noisy(), SIGMA)


@pytest.mark.parametrize("kind", STATELESS + REMEMBERING, ids=lambda kind: kind.__name__)
def test_two_models_that_share_a_method_do_not_share_what_it_remembers(comfyui, tiny, internals, kind):
    # A method in front of two LoRAs of one checkpoint: both MODELs hold the very same functions.
    def pair():
        checkpoint = patched(comfyui, tiny, kind)
        return tiny.lora(checkpoint, 1), tiny.lora(checkpoint, 2)

    base, prompt = tiny.conditioning(9), tiny.conditioning(1)
    u = core_twice(comfyui, pair()[0], prompt, base, 0.0)
    c = core_twice(comfyui, pair()[0], prompt, base, 2.0)
    d = [core_twice(comfyui, pair()[1], prompt, base, 0.0), core_twice(comfyui, pair()[1], base, base, 1.0)]
    prior, domain = pair()
    guider = internals.in_domain_guider(prior, domain, prompt, base, 1.5, 2.0)
    found = Twice(comfyui, noisy(1), noisy(2)).run(guider, noisy(1))
    for i in range(2):
        # The domain model is asked for the negative, alone.
        expected = c[i] + 1.5 * (d[0][i] - u[i])
        assert relative(found[i], expected) < 1e-4, (i, relative(found[i], c[i] + 1.5 * (d[1][i] - u[i])))


def test_the_same_two_come_together_and_every_other_alone(comfyui, tiny, internals):
    calls = []

    def listen(comfyui, model):
        model.set_model_unet_function_wrapper(
            lambda run, a: (calls.append(list(a["cond_or_uncond"])), run(a["input"], a["timestep"], **a["c"]))[1]
        )

    base, conds = tiny.conditioning(9), {name: tiny.conditioning(i) for i, name in enumerate(WEIGHTS)}
    tiny.predict(multi(internals, patched(comfyui, tiny, listen), base, conds), noisy(), SIGMA)
    assert sorted(map(sorted, calls)) == [[0], [0], [0, 1]]


# ---- memories that none can have to itself --------------------------------------------------------------------------


class InTheClass:
    def __call__(self, run, a):
        return answered_from(type(self).cache, a, run)


def in_a_class(comfyui, model):
    model.set_model_unet_function_wrapper(type("InAClass", (InTheClass,), {"cache": {}})())


GLOBAL: dict = {}


def _from_a_global(run, a):
    return answered_from(GLOBAL, a, run)


def in_a_global_variable(comfyui, model):
    GLOBAL.clear()
    model.set_model_unet_function_wrapper(lambda run, a: _from_a_global(run, a))


def in_a_generator(comfyui, model):
    def answers():
        run, a, cache = None, None, {}
        while True:
            run, a = yield None if run is None else answered_from(cache, a, run)

    running = answers()
    next(running)
    model.set_model_unet_function_wrapper(lambda run, a: running.send((run, a)))


def in_a_list_of_nothing(comfyui, model):
    memory: list = []

    def wrapper(run, a):
        if not memory:
            memory.append(run(a["input"], a["timestep"], **a["c"]))
        return memory[0]

    model.set_model_unet_function_wrapper(wrapper)


def in_a_tensor(comfyui, model):
    memory, calls = torch.zeros(4, 4, 16, 16), {"made": 0}

    def wrapper(run, a):
        if not calls["made"]:
            memory[: len(a["input"])] = run(a["input"], a["timestep"], **a["c"])
        calls["made"] += 1
        return memory[: len(a["input"])].clone()

    model.set_model_unet_function_wrapper(wrapper)


def on_the_model(comfyui, model):
    def wrapper(executor, *args, **kwargs):
        cache = vars(executor.class_obj).setdefault("_cache", {})
        run = lambda *_: executor(*args, **kwargs)  # noqa: E731
        return answered_from(cache, {**options_of(args, kwargs), "input": None, "timestep": None, "c": {}}, run)

    model.add_wrapper_with_key(comfyui.patcher_extension.WrappersMP.APPLY_MODEL, "some pack", wrapper)


def on_a_block(comfyui, model):
    network = model.model.diffusion_model
    model.set_model_unet_function_wrapper(
        lambda run, a: answered_from(vars(network.middle_block).setdefault("_cache", {}), a, run)
    )


def on_the_network_by_a_patch(comfyui, model):
    network = model.model.diffusion_model

    def patch(q, k, v, extra_options):
        cache = vars(network).setdefault("_values", {})
        indices = extra_options["cond_or_uncond"]
        keys = [(index, extra_options["block"], v.shape[1:]) for index in indices]
        for key, chunk in zip(keys, v.chunk(len(indices))):
            cache.setdefault(key, 0.5 * chunk)
        return q, k, torch.cat([cache[key] for key in keys])

    model.set_model_attn1_patch(patch)


def in_a_replaced_method(comfyui, model):
    forward, cache = model.model.diffusion_model.forward, {}

    def wrapped(x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **more):  # noqa: B006
        run = lambda *_: forward(x, timesteps, context, y, control, transformer_options, **more)  # noqa: E731
        return answered_from(cache, {**transformer_options, "input": x, "timestep": timesteps, "c": {}}, run)

    model.add_object_patch("diffusion_model.forward", wrapped)


OUT_OF_REACH = [
    in_a_class,
    in_a_global_variable,
    in_a_generator,
    in_a_list_of_nothing,
    in_a_tensor,
    on_the_model,
    on_a_block,
    on_the_network_by_a_patch,
    in_a_replaced_method,
]


@pytest.mark.parametrize("kind", OUT_OF_REACH, ids=lambda kind: kind.__name__)
def test_memories_that_prompts_would_share_are_refused_by_name(comfyui, tiny, internals, kind):
    base, conds = tiny.conditioning(9), {name: tiny.conditioning(i) for i, name in enumerate(WEIGHTS)}
    with pytest.raises(ValueError, match=r"found \S.* on the prior, which would mix up its 4 conditionings; "):
        tiny.predict(multi(internals, patched(comfyui, tiny, kind), base, conds), noisy(), SIGMA)
    # Two are what it was made for.
    expected = core_twice(comfyui, patched(comfyui, tiny, kind), conds["a"], base, 2.0)
    ours = multi(internals, patched(comfyui, tiny, kind), base, conds, {"a": 2.0})
    assert all(map(torch.equal, Twice(comfyui, noisy(1), noisy(2)).run(ours, noisy(1)), expected))


@pytest.mark.parametrize(
    "kind", [one for one in OUT_OF_REACH if one is not in_a_list_of_nothing], ids=lambda kind: kind.__name__
)
def test_memories_that_models_would_share_are_refused_by_name(comfyui, tiny, internals, kind):
    checkpoint = patched(comfyui, tiny, kind)
    prior, domain = tiny.lora(checkpoint, 1), tiny.lora(checkpoint, 2)
    guider = internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(9), 1.5, 2.0)
    with pytest.raises(ValueError, match=r"found \S.* on .*, which would mix up the models' conditionings; "):
        Twice(comfyui, noisy(1), noisy(2)).run(guider, noisy(1))


def test_a_method_on_models_of_two_files_may_remember_on_each(comfyui, tiny, internals):
    def build(kind):
        prior, domain = (patched(comfyui, tiny, kind, seed) for seed in (0, 1))
        guider = internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(9), 1.5, 2.0)
        return Twice(comfyui, noisy(1), noisy(2)).run(guider, noisy(1))

    # What was answered first is answered again.
    first, second = build(on_a_block)
    assert relative(second, first) < 1e-4
    with pytest.raises(ValueError, match="would mix up the models' conditionings"):
        build(in_a_global_variable)


# ---- core's caches and methods --------------------------------------------------------------------------------------


def easycache(model, threshold=3.0):
    nodes = importlib.import_module("comfy_extras.nodes_easycache")
    return nodes.EasyCacheNode.execute.__func__(nodes.EasyCacheNode, model, threshold, 0.0, 1.0, False).result[0]


def lazycache(model, threshold=3.0):
    nodes = importlib.import_module("comfy_extras.nodes_easycache")
    return nodes.LazyCacheNode.execute.__func__(nodes.LazyCacheNode, model, threshold, 0.0, 1.0, False).result[0]


def node_of_core(module, name, *inputs):
    """Of either kind: 0.3.75 has some of these nodes in the old style."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    made = node.execute(*inputs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*inputs)
    return getattr(made, "result", made)[0]


def hypertile(model):
    # Tiles are drawn at random; with a single one nothing is left to chance.
    return node_of_core("nodes_hypertile", "HyperTile", model, 1024, 1, 0, False)


def freeu(model):
    return node_of_core("nodes_freelunch", "FreeU_V2", model, 1.3, 1.4, 0.9, 0.2)


@pytest.mark.parametrize("method", [freeu, hypertile])
def test_cores_methods_give_every_prompt_what_it_gets_alone(comfyui, tiny, internals, method):
    base, conds = tiny.conditioning(9), {name: tiny.conditioning(i) for i, name in enumerate(WEIGHTS)}
    prior = method(tiny.prior(0))
    x = noisy()
    u = tiny.denoised(prior, base, x, SIGMA)
    expected = u + sum(w * (tiny.denoised(prior, conds[name], x, SIGMA) - u) for name, w in WEIGHTS.items())
    assert relative(tiny.predict(multi(internals, prior, base, conds), x, SIGMA), expected) < 1e-4


@pytest.mark.parametrize("attention_too", [False, True])
def test_easycache_knows_every_prompt_by_its_own_name(comfyui, tiny, internals, attention_too):
    base, conds = tiny.conditioning(9), {name: tiny.conditioning(i) for i, name in enumerate(WEIGHTS)}

    def build(model):
        if attention_too:
            model.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
        return multi(internals, model, base, conds)

    def steps(guider):
        seen = []

        class Sampler(comfyui.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
                for step in range(6):  # nearly the same question: whatever is remembered of it is nearly right
                    seen.append(model_wrap(noisy() + 1e-3 * step * noisy(2), torch.full((2,), SIGMA), **extra_args))
                return torch.zeros_like(noisy())

        guider.sample(
            torch.zeros_like(noisy()), torch.zeros_like(noisy()), Sampler(), torch.tensor([SIGMA] * 6 + [0.0]), seed=0
        )
        return seen

    plain, cached = build(tiny.prior(0).clone()), build(easycache(tiny.prior(0)))
    expected, found = steps(plain), steps(cached)
    assert cached.samples_per_step < plain.samples_per_step == 4.0
    for one, other in zip(found, expected):
        assert relative(one, other) < 1e-2
    mixed = [multi(internals, tiny.prior(0), base, {**conds, "b": conds["a"]})]
    assert relative(steps(mixed[0])[0], expected[0]) > 5e-2, "one prompt's answer for another's would show"


@pytest.mark.parametrize("domain_weight", [0.0, 1.5])
@pytest.mark.parametrize("cache", [easycache, lazycache])
def test_the_cost_is_what_the_networks_were_run_for(comfyui, tiny, internals, cache, domain_weight):
    prior, domain, ran = cache(tiny.prior(0)), tiny.prior(1), {"prior": 0, "domain": 0}

    def listen(name):
        def hook(module, args):
            ran[name] += args[0].shape[0]

        return hook

    handles = [
        patcher.model.diffusion_model.time_embed.register_forward_pre_hook(listen(name))
        for name, patcher in (("prior", prior), ("domain", domain))
    ]
    guider = internals.in_domain_guider(prior, domain, tiny.conditioning(1), tiny.conditioning(2), domain_weight, 2.0)
    try:
        tiny.sample(guider, steps=10, size=16)
    finally:
        for handle in handles:
            handle.remove()
    assert guider.samples_per_step == sum(ran.values()) / 10 < 2.0 + bool(domain_weight)
    assert guider.evaluations["domain"] == ran["domain"]


def test_what_hooks_run_again_is_counted(comfyui, tiny, internals):
    node = importlib.import_module("comfy_extras.nodes_pag").PerturbedAttentionGuidance
    prior = node.execute(tiny.prior(0), 3.0).result[0]
    guider = internals.in_domain_guider(prior, tiny.prior(1), tiny.conditioning(1), tiny.conditioning(2), 1.5, 2.0)
    tiny.sample(guider, steps=4, size=16)
    assert guider.evaluations == {"base": 4, "domain": 4, "control": 8} and guider.samples_per_step == 4.0


def test_a_wrapper_that_answers_from_memory_is_not_counted_as_a_prediction(comfyui, tiny, internals):
    guider = internals.in_domain_guider(
        patched(comfyui, tiny, cached_by_index), tiny.prior(1), tiny.conditioning(1), tiny.conditioning(2), 1.5, 2.0
    )
    tiny.sample(guider, steps=4, batch=2)
    assert guider.evaluations == {"base": 1, "domain": 4, "control": 1}
