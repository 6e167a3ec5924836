"""Load Domain UNet: text-free files as MODELs that equal the library's UNet and survive what ComfyUI does."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

SIGMAS = torch.tensor([9.0, 0.7])
FORMS = ("constant", "cached")


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


def randomised(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                # Sharp attention: a nearly constant one would hide mistakes with keys and values.
                noise = noise / parameter[0].numel() ** 0.5 * (2.0 if "to_q" in name or "to_k" in name else 1.0)
            else:
                noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            parameter.copy_(noise)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def library(comfyui):
    """A random tiny prior in the library's own network, and its two text-free forms on one random empty prompt."""
    unet, null_text, files = module("guidance.networks.unet"), module("guidance.null_text"), module("guidance.files")
    config = unet.UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=(1, 1),
        transformer_depth=(1, 2),
        transformer_depth_middle=1,
        transformer_depth_output=(1, 1, 1, 2),
        context_dim=96,
        num_heads=4,
    )
    prior = randomised(unet.UNet(config), 0)
    generator = torch.Generator().manual_seed(1)
    context = null_text.NullContext(torch.randn(1, 7, 96, generator=generator))
    weights = prior.state_dict()
    probes = module("guidance.probes").Probes(
        torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([900.0, 500.0, 100.0, 10.0])
    )
    constant = null_text.build_constant(weights, config, context, probes)[:2]
    return SimpleNamespace(
        config=config,
        prior=prior,
        context=context,
        probes=probes,
        unet=unet,
        files=files,
        forms={
            "none": (weights, config),
            "cached": null_text.build_cached(weights, config, context),
            "constant": constant,
        },
    )


@pytest.fixture
def write(library, tmp_path):
    """Writes a form (or given weights) as a domain file; its path."""

    def write_file(form: str, name: str = "tiny", weights=None, **fields) -> str:
        form_weights, config = library.forms[form]
        metadata = library.files.DomainMetadata(
            config, **{"latent_format": "sd15", "prediction_type": "epsilon", "domain_name": name, **fields}
        )
        path = tmp_path / f"{name}.safetensors"
        library.files.write_domain_file(path, form_weights if weights is None else weights, metadata)
        return str(path)

    return write_file


@pytest.fixture
def load(comfyui):
    return module("nodes.comfy_internals.models.loading").load_domain_unet


def noisy(batch: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * 4


@torch.inference_mode()
def core_eps(model, x: torch.Tensor, context: torch.Tensor | None = None, **options) -> torch.Tensor:
    """The noise a MODEL predicts, through core's own apply_model on loaded weights."""
    importlib.import_module("comfy.model_management").load_models_gpu([model])
    options = {**model.model_options["transformer_options"], **options}
    x0 = model.model.apply_model(x, SIGMAS, c_crossattn=context, transformer_options=options)
    return (x - x0) / SIGMAS[:, None, None, None]


@torch.inference_mode()
def library_eps(library, form: str, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    weights, config = library.forms[form]
    network = library.unet.UNet(config).eval()
    network.load_state_dict(weights)
    schedule = module("guidance.diffusion").NoiseSchedule.scaled_linear()
    scaled = x / (SIGMAS[:, None, None, None] ** 2 + 1).sqrt()
    return network(scaled, schedule.timestep(SIGMAS, nearest=True), context)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and bool(expected.isfinite().all())
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# ---- the same function as the library's -----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_librarys_network(library, write, load, form):
    x = noisy()
    model = load(write(form))
    assert error(core_eps(model, x), library_eps(library, form, x)) < 1e-4
    # Text changes nothing at all.
    assert torch.equal(core_eps(model, x, torch.randn(2, 9, 96)), core_eps(model, x))


def test_untrained_cached_equals_cores_full_model_on_the_empty_prompt(library, write, load):
    x = noisy()
    full = load(write("none", "full"))
    expected = core_eps(full, x, library.context.tensor.expand(2, -1, -1))
    assert error(core_eps(load(write("cached")), x), expected) < 1e-5
    assert error(core_eps(full, x, torch.randn(2, 7, 96)), expected) > 0.05  # text matters to the full model


def test_constant_equals_cores_full_model_with_attention_replaced_by_its_mean(library, write, load):
    """The hand computation: core's full UNet, each cross-attention replaced by the mean measured on the probes."""
    full = load(write("none", "full"))
    outputs: dict[str, list] = {}
    blocks = {name: m for name, m in full.model.diffusion_model.named_modules() if name.endswith(".attn2")}
    record = [
        m.register_forward_hook(lambda _m, _a, out, name=name: outputs.setdefault(name, []).append(out.flatten(0, 1)))
        for name, m in blocks.items()
    ]
    with torch.no_grad():
        full.model.diffusion_model(
            library.probes.x, library.probes.timesteps, context=library.context.tensor.expand(4, -1, -1)
        )
    for hook in record:
        hook.remove()
    replace_by_mean = [
        m.register_forward_hook(lambda _m, _a, out, name=name: torch.cat(outputs[name]).mean(0).expand_as(out))
        for name, m in blocks.items()
    ]
    x = noisy()
    expected = core_eps(full, x, library.context.tensor.expand(2, -1, -1))
    for hook in replace_by_mean:
        hook.remove()
    assert error(core_eps(load(write("constant")), x), expected) < 1e-4
    assert error(core_eps(full, x, library.context.tensor.expand(2, -1, -1)), expected) > 0.02


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_prediction_type_and_schedule_come_from_the_file(comfyui, write, load, prediction, zero_snr):
    model = load(write("cached", prediction_type=prediction, zero_snr=zero_snr))
    sampling = model.get_model_object("model_sampling")
    kind = {"epsilon": comfyui.model_sampling.EPS, "v_prediction": comfyui.model_sampling.V_PREDICTION}[prediction]
    assert isinstance(sampling, kind)
    assert isinstance(sampling, comfyui.model_sampling.V_PREDICTION) == (prediction != "epsilon")
    assert (float(sampling.sigma_max) > 4000) == zero_snr


# ---- size and number formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_takes_the_memory_that_text_free_promises(library, write, load, form):
    full, model = load(write("none", "full")), load(write(form))
    parts = {"constant": (".attn2.", ".norm2."), "cached": (".attn2.to_k.", ".attn2.to_v.")}[form]
    gone = sum(t.nbytes for k, t in library.forms["none"][0].items() if any(part in k for part in parts))
    added = sum(t.nbytes for k, t in library.forms[form][0].items() if ".attn2.null_" in k)
    assert full.model_size() - model.model_size() == gone - added > 0
    held = sum(p.nbytes for p in model.model.diffusion_model.parameters())
    assert held == sum(t.nbytes for t in library.forms[form][0].values())


@pytest.mark.parametrize(
    "family, form, millions, percent",
    [
        ("SD15", "constant", 44.0, 5.1),
        ("SD15", "cached", 17.2, 2.0),
        ("SDXL", "constant", 545.8, 21.3),
        ("SDXL", "cached", 328.0, 12.8),
    ],
)
def test_published_families_shrink_by_what_the_documentation_says(comfyui, family, form, millions, percent):
    """Counted on core's own networks of full size, without memory for their weights."""
    openaimodel = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
    shapes = {
        "SD15": dict(
            channel_mult=[1, 2, 4, 4],
            num_res_blocks=[2] * 4,
            transformer_depth=[1] * 6 + [0] * 2,
            context_dim=768,
            transformer_depth_output=[1] * 9 + [0] * 3,
            transformer_depth_middle=1,
            num_heads=8,
        ),
        "SDXL": dict(
            channel_mult=[1, 2, 4],
            num_res_blocks=[2] * 3,
            transformer_depth=[0, 0, 2, 2, 10, 10],
            context_dim=2048,
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
            transformer_depth_middle=10,
            num_head_channels=64,
            use_linear_in_transformer=True,
            num_classes="sequential",
            adm_in_channels=2816,
        ),
    }
    network = openaimodel.UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        use_spatial_transformer=True,
        legacy=False,
        device="meta",
        operations=comfyui.ops.disable_weight_init,
        **shapes[family],
    )
    before = sum(p.numel() for p in network.parameters())
    module("nodes.comfy_internals.models.text_free").remove_text(network, form, 77)
    gone = before - sum(p.numel() for p in network.parameters())
    assert gone / 1e6 == pytest.approx(millions, abs=0.1)
    assert 100 * gone / before == pytest.approx(percent, abs=0.06)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype, bytes_a_weight, tolerance",
    [("bf16", 2, 0.03), ("fp16", 2, 0.005), ("fp8_e4m3fn", 1, 0.4), ("fp8_e4m3fn_fast", 1, 0.4), ("fp8_e5m2", 1, 0.7)],
)
def test_weight_dtypes(library, write, load, form, dtype, bytes_a_weight, tolerance):
    model = load(write(form), dtype)
    assert all(p.element_size() == bytes_a_weight for p in model.model.diffusion_model.parameters())
    x = noisy()
    assert 0 < error(core_eps(model, x), library_eps(library, form, x)) < tolerance


# ---- everything that patches models ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_lora_reaches_what_is_left_and_skips_the_rest(comfyui, library, write, load, form, caplog):
    model = load(write(form))
    generator = torch.Generator().manual_seed(5)
    lora, deltas = {}, {}
    for part in ("attn1.to_q", "attn2.to_k", "attn2.to_out.0"):
        key = f"input_blocks.1.1.transformer_blocks.0.{part}.weight"
        out_features, in_features = library.forms["none"][0][key].shape
        down = torch.randn(2, in_features, generator=generator)
        up = torch.randn(out_features, 2, generator=generator) * 0.1
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        lora |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        deltas[key] = up @ down
    with caplog.at_level("WARNING"):
        patched, _ = comfyui.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)
    lines = [line for line in caplog.messages if "not loaded" in line.lower() or "takes no text" in line]
    assert len(lines) == 1 and "left out" in lines[0] and "attn2.to_k" in lines[0]

    x = noisy()
    weights, config = library.forms[form]
    expected = SimpleNamespace(
        unet=library.unet,
        forms={
            form: (
                {key: weight + 0.5 * deltas[key] if key in deltas else weight for key, weight in weights.items()},
                config,
            )
        },
    )
    reference = library_eps(expected, form, x)
    assert error(core_eps(patched, x), reference) < 1e-4
    assert error(core_eps(model, x), reference) > 1e-3  # and the unpatched model is itself again
    assert error(core_eps(model, x), library_eps(library, form, x)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_lora_as_a_hook_equals_lora_on_the_model(comfyui, tiny, write, load, form):
    model, x = load(write(form)), noisy(1)
    key = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_v"
    lora = {f"{key}.lora_down.weight": torch.randn(2, 64), f"{key}.lora_up.weight": torch.randn(64, 2) * 0.2}
    hooks = comfyui.hooks.create_hook_lora(lora, 1.0, 0.0)
    text = torch.zeros(1, 7, 96)
    hooked = tiny.denoised(model, [[text, {"hooks": hooks}]], x, 3.0)
    patched, _ = comfyui.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert error(hooked, tiny.denoised(patched, [[text, {}]], x, 3.0)) < 1e-5
    assert error(hooked, tiny.denoised(model, [[text, {}]], x, 3.0)) > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_attention_patches_do_not_crash(library, write, load, form):
    model, x, context = load(write(form)), noisy(), torch.randn(2, 7, 96)
    attention = importlib.import_module("comfy.ldm.modules.attention")
    calls = []

    def plain_replace(q, k, v, extra_options):
        calls.append("replace")
        assert q.shape[0] == k.shape[0] == v.shape[0] == 2 and q.shape[-1] == k.shape[-1] == v.shape[-1]
        return attention.optimized_attention(q, k, v, extra_options["n_heads"])

    def keep(n, context, value, extra_options):
        calls.append("attn2")
        return n, context, value

    def keep_output(n, extra_options):
        calls.append("output")
        n += 0.0  # in place, as some packs do
        return n

    expected = core_eps(model, x, context)
    patched = model.clone()
    for block, number in (("input", 1), ("input", 3), ("middle", 0), ("output", 0), ("output", 2)):
        patched.set_model_attn2_replace(plain_replace, block, number)
        patched.set_model_attn1_replace(plain_replace, block, number)
    patched.set_model_attn2_patch(keep)
    patched.set_model_attn2_output_patch(keep_output)
    patched.set_model_attn1_patch(keep)
    # Patches that compute plain attention leave the result alone, with or without text on the conditioning.
    assert error(core_eps(patched, x, context), expected) < 1e-5
    assert {"replace", "attn2", "output"} <= set(calls)


def test_cached_attention_honours_an_attention_override(write, load):
    model, x, seen = load(write("cached")), noisy(), []

    def override(function, *args, **kwargs):
        seen.append(args[1].shape)
        return function(*args, **kwargs)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert error(core_eps(patched, x), core_eps(model, x)) < 1e-6
    assert any(shape[1] == 7 for shape in seen)  # the 7 frozen tokens


@pytest.mark.parametrize("form", FORMS)
def test_control_net_acts_as_on_the_full_model(comfyui, tiny, library, write, load, form):
    model = load(write(form))
    unet = {"num_res_blocks": [1, 1], "transformer_depth": [1, 2], "context_dim": 96}
    control = tiny.control_net(1, **unet)
    empty = [[library.context.tensor, {}]]
    controlled = [[library.context.tensor, {"control": control, "control_apply_to_uncond": True}]]
    x = noisy(1)
    plain, result = tiny.denoised(model, empty, x, 3.0), tiny.denoised(model, controlled, x, 3.0)
    assert error(result, plain) > 1e-3
    if form == "cached":
        full = load(write("none", "full"))
        assert error(result, tiny.denoised(full, controlled, x, 3.0)) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_conditioning_without_text_is_enough(tiny, library, write, load, form):
    """Also for the patches and ControlNets that want to see some text."""
    model, x = load(write(form)), noisy(1)
    attention = importlib.import_module("comfy.ldm.modules.attention")
    model.set_model_attn2_replace(lambda q, k, v, o: attention.optimized_attention(q, k, v, o["n_heads"]), "middle", 0)
    unet = {"num_res_blocks": [1, 1], "transformer_depth": [1, 2], "context_dim": 96}
    with_text = tiny.denoised(model, [[torch.randn(1, 77, 96), {}]], x, 3.0)
    assert torch.equal(tiny.denoised(model, [[None, {}]], x, 3.0), with_text)
    control = {"control": tiny.control_net(1, **unet), "control_apply_to_uncond": True}
    assert not torch.equal(tiny.denoised(model, [[None, control]], x, 3.0), with_text)


@pytest.mark.parametrize("form", FORMS)
def test_the_log_says_once_that_text_is_ignored(tiny, write, load, form, caplog):
    model = load(write(form, "porcelain"))
    with caplog.at_level("INFO"):
        for _ in range(2):
            tiny.denoised(model, [[torch.randn(1, 77, 96), {}]], noisy(1), 3.0)
    lines = [record.getMessage() for record in caplog.records if "porcelain" in record.getMessage()]
    assert len(lines) == 1 and "ignored" in lines[0]


@pytest.mark.parametrize("form", FORMS)
def test_low_vram_loading_casts_on_the_fly(comfyui, library, write, load, form):
    """Part of the weights stays offloaded and unpatched; a LoRA is then applied while casting."""
    x = noisy()
    model = load(write(form), "fp16")
    patched = model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) * 0.2
    patched.add_patches({key: ("diff", (delta,))})
    if form == "cached":
        null_key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.null_k.weight"
        patched.add_patches({null_key: ("diff", (torch.ones(7, 64) * 0.3,))})
    comfyui.model_management.unload_all_models()
    expected = core_eps(patched, x)
    comfyui.model_management.unload_all_models()
    with torch.inference_mode():
        patched.partially_load(torch.device("cpu"), extra_memory=int(0.45 * patched.model_size()))
        assert patched.model.model_lowvram and 0 < patched.loaded_size() < patched.model_size() / 2
        streamed = {name for name, m in patched.model.named_modules() if hasattr(m, "prev_comfy_cast_weights")}
        x0 = patched.model.apply_model(x, SIGMAS, transformer_options={})
        result = (x - x0) / SIGMAS[:, None, None, None]
        patched.detach()
    assert streamed
    if form == "cached":
        assert any(name.endswith("null_k") for name in streamed)
    assert error(result, expected) < 2e-3
    assert error(result, library_eps(library, form, x)) > 5e-3


def test_weights_taken_from_offloading_are_given_back(comfyui, write, load, monkeypatch):
    # On a GPU the copy of an offloaded weight is reused once it is given back; one that never is stays occupied.
    taken, given = [], []
    cast, uncast = comfyui.ops.cast_bias_weight, comfyui.ops.uncast_bias_weight

    def take(module, *args, **kwargs):
        found = cast(module, *args, **kwargs)
        taken.append((id(module), kwargs.get("offloadable", False), id(found[2]) if len(found) > 2 else None))
        return found

    def give(module, weight, bias, stream):
        given.append((id(module), True, id(stream)))
        return uncast(module, weight, bias, stream)

    monkeypatch.setattr(comfyui.ops, "cast_bias_weight", take)
    monkeypatch.setattr(comfyui.ops, "uncast_bias_weight", give)
    model = load(write("cached"), "fp16")
    frozen = [m for name, m in model.model.named_modules() if name.endswith(("attn2.null_k", "attn2.null_v"))]
    assert frozen
    for module in frozen:
        module(torch.zeros(1, 4, module.weight.shape[1]), 2)
    assert taken == given and len(taken) == len(frozen)


def test_every_weight_is_in_a_module_that_core_loads(write, load):
    for form in FORMS:
        model = load(write(form))
        listed = {f"{name}.{p}" for _, _, name, _, params in model._load_list() for p in params}
        assert listed == {name for name, _ in model.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiles(comfyui, library, write, load, form):
    model, x = load(write(form)), noisy()
    compiled = torch.compile(model.model.diffusion_model, backend="eager")
    schedule = module("guidance.diffusion").NoiseSchedule.scaled_linear()
    scaled = x / (SIGMAS[:, None, None, None] ** 2 + 1).sqrt()
    with torch.no_grad():
        out = compiled(scaled, schedule.timestep(SIGMAS, nearest=True), context=torch.zeros(2, 1, 96))
    assert error(out, library_eps(library, form, x)) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_deep_copies_come_from_the_file(write, load, form):
    model, x = load(write(form), "fp16"), noisy()
    factory, arguments = model.cached_patcher_init
    copy = factory(*arguments, disable_dynamic=True)
    assert copy.model is not model.model and copy.model_dtype() == torch.float16
    assert type(copy.model) is type(model.model)
    assert torch.equal(core_eps(copy, x), core_eps(model, x))
    clone = model.clone()
    assert clone.model.indomain_domain is model.model.indomain_domain


@pytest.mark.parametrize("form", FORMS)
def test_weights_can_take_part_in_autograd(write, load, form):
    with torch.inference_mode():  # as ComfyUI runs nodes
        model = load(write(form))
    assert not any(p.is_inference() for p in model.model.parameters())
    x = noisy().requires_grad_()
    model.model.apply_model(x, SIGMAS, transformer_options={}).sum().backward()
    assert bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
@pytest.mark.parametrize("form", FORMS)
def test_cores_model_save_can_be_loaded_again(comfyui, library, write, load, tiny, form, patched, tmp_path):
    model = load(write(form))
    if patched:
        model = tiny.lora(model, 1)
    save = importlib.import_module("comfy_extras.nodes_model_merging").ModelSave()
    save.output_dir = str(tmp_path)
    with torch.inference_mode():  # as ComfyUI runs nodes
        save.save(model, "saved")
    (saved,) = tmp_path.glob("saved*.safetensors")
    weights = library.files.read_state_dict(str(saved), prefix="model.diffusion_model.")
    assert set(weights) == set(library.forms[form][0])
    assert library.files.unet_layout(library.files.read_keys(str(saved)), str(saved)) == form
    x = noisy()
    assert torch.equal(core_eps(load(write(form, "again", weights=weights)), x), core_eps(model, x))


def test_a_text_free_model_stays_one_where_core_makes_a_patcher_of_another_class(comfyui, write, load, monkeypatch):
    """Newer versions page weights in through a class that makes plain patchers on the CPU and for hooks."""
    plain = comfyui.model_patcher.ModelPatcher

    class Paging(plain):
        def __new__(cls, model, load_device, offload_device, *args, **kwargs):
            return plain(model, load_device, offload_device) if load_device.type == "cpu" else super().__new__(cls)

        def clone(self, *args, **kwargs):
            return plain(self.model, self.load_device, self.offload_device)

    monkeypatch.setattr(comfyui.model_patcher, "CoreModelPatcher", Paging, raising=False)
    model = load(write("constant"))
    absent = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert absent in model.model.state_dict()
    for one in (model, model.clone(), model.clone().clone()):
        assert absent not in one.model_state_dict() and isinstance(one, plain)
        assert all(weights for weights in one.get_key_patches("diffusion_model.").values())
    paged = object.__new__(Paging)
    plain.__init__(paged, model.model, torch.device("meta"), torch.device("cpu"))
    mixed = module("nodes.comfy_internals.models.text_free").without_text(paged)
    assert isinstance(mixed, Paging) and absent not in mixed.clone().model_state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_what_core_may_ask_of_its_attention_tomorrow_is_there(comfyui, write, load, form, monkeypatch):
    attention = importlib.import_module("comfy.ldm.modules.attention")
    asked, forward = [], attention.BasicTransformerBlock.forward

    def of_tomorrow(block, *args, **kwargs):
        asked.append(block.attn2.of_tomorrow)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(attention.CrossAttention, "of_tomorrow", True, raising=False)
    monkeypatch.setattr(attention.BasicTransformerBlock, "forward", of_tomorrow)
    core_eps(load(write(form)), noisy())
    assert len(asked) == 9 and all(asked), "once for each block"


# ---- families -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_sdxl_freezes_the_pooled_text_and_keeps_the_size_live(comfyui, library, load, tmp_path, form):
    """Core's SDXL class on a UNet of two levels; the real one would not fit a test."""
    null_text = module("guidance.null_text")
    config = library.unet.UNetConfig(
        model_channels=320,
        channel_mult=(1, 1),
        num_res_blocks=(1, 1),
        transformer_depth=(0, 1),
        transformer_depth_middle=1,
        transformer_depth_output=(0, 0, 1, 1),
        context_dim=2048,
        num_head_channels=64,
        use_linear_in_transformer=True,
        adm_in_channels=2816,
    )
    prior = randomised(library.unet.UNet(config), 2)
    generator = torch.Generator().manual_seed(4)
    context = null_text.NullContext(
        torch.randn(1, 7, 2048, generator=generator), pooled=torch.randn(1, 1280, generator=generator)
    )
    if form == "cached":
        weights, text_free = null_text.build_cached(prior.state_dict(), config, context)
    else:
        probes = module("guidance.probes").Probes(torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 2816))
        weights, text_free, _ = null_text.build_constant(prior.state_dict(), config, context, probes)
    model_base = comfyui.comfy.model_base

    class SmallSDXL(comfyui.supported_models.SDXL):
        unet_config = {**comfyui.supported_models.SDXL.unet_config, "transformer_depth": [0, 1]}

    path = str(tmp_path / "sdxl.safetensors")
    library.files.write_domain_file(path, weights, library.files.DomainMetadata(text_free, "sdxl", "epsilon"))
    models = comfyui.supported_models.models
    models.insert(0, SmallSDXL)
    try:
        model = load(path)
    finally:
        models.remove(SmallSDXL)
    assert isinstance(model.model, model_base.SDXL) and "latent_format" in vars(model.model)

    noise, cpu = torch.zeros(1, 4, 8, 8), torch.device("cpu")

    def y(width: int, **conditioning):
        return model.model.encode_adm(noise=noise, device=cpu, width=width, height=64, **conditioning)

    text = y(64, pooled_output=torch.randn(1, 1280))
    assert torch.equal(text[:, 1280:], y(64)[:, 1280:])
    assert not torch.equal(y(64), y(128))
    x = noisy(1)

    @torch.inference_mode()
    def predicted(network, y, text=None):
        return network(x, torch.tensor([500.0]), context=text, y=y)

    live = y(128)
    full_y = torch.cat([context.pooled, live[:, 1280:]], dim=1)
    if form == "cached":
        assert error(predicted(model.model.diffusion_model, live), predicted(prior, full_y, context.tensor)) < 1e-4
    changed = predicted(model.model.diffusion_model, y(64))
    assert torch.equal(predicted(model.model.diffusion_model, text), changed)
    assert error(changed, predicted(model.model.diffusion_model, live)) > 1e-4


def test_full_unets_go_through_cores_loader(comfyui, tiny, library, load, tmp_path, monkeypatch):
    """A file without this project's metadata that takes text; core must know its family."""
    prior = tiny.prior(num_res_blocks=[1, 1])
    path = str(tmp_path / "full.safetensors")
    weights = prior.model.diffusion_model.state_dict().items()
    comfyui.utils.save_torch_file({f"model.diffusion_model.{k}": v.contiguous() for k, v in weights}, path)

    class TinySD15(comfyui.supported_models.SD15):
        unet_config = {**comfyui.supported_models.SD15.unet_config, "context_dim": 24, "model_channels": 32}

    with pytest.raises(library.files.FileProblem, match="full.safetensors.*family"):
        load(path)
    monkeypatch.setattr(comfyui.supported_models, "models", [TinySD15, *comfyui.supported_models.models])
    model = load(path, "fp16")
    assert model.model_dtype() == torch.float16
    assert model.model.indomain_domain.form == "full"
    x, text = noisy(), torch.randn(2, 7, 24)
    assert error(core_eps(model, x, text), core_eps(prior, x, text)) < 5e-3
    assert model.cached_patcher_init[0](*model.cached_patcher_init[1]).model is not model.model
