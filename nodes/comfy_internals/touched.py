"""Everything of ComfyUI's inside that this pack touches, so that what a new version breaks is seen in one place.

A line without indent names a module. The indented lines below it list its names, each with the parameters relied on:
"name(first, second, *, keyword)" means that the first parameters are called so, in this order, and that the keyword is
taken; a name alone only has to exist. "Class: names" are attributes and methods of a class, "name?" is used where a
version has it. tests/comfyui/test_touched.py compares the list with the ComfyUI at hand, and with what the code of this
package uses.
"""

from __future__ import annotations

_LIST = """
comfy.cli_args
    args: listen
comfy.controlnet
    ControlBase; ControlLora
    ControlBase: previous_controlnet; cond_hint_original
    T2IAdapter: control_input
comfy.hooks
    EnumHookMode: MinVram
    HookGroup: hooks; clone()
    Hook: hook_keyframe
    HookKeyframeGroup: clone()
comfy.latent_formats
    LatentFormat; SD15; SDXL
    LatentFormat: scale_factor; latent_channels; latent_dimensions; latent_rgb_factors; latent_rgb_factors_bias
comfy.ldm.modules.attention
    BasicTransformerBlock
    BasicTransformerBlock: attn2; norm2; disable_self_attn
    CrossAttention: forward(x, context, value, mask); to_q; to_k; to_v; to_out; heads; dim_head
comfy.ldm.modules.diffusionmodules.openaimodel
    UNetModel
    UNetModel: out; dtype
comfy.lora
    calculate_weight(patches, weight, key)
comfy.model_base
    BaseModel(model_config); SDXL; SDXLRefiner
    BaseModel: adm_channels; apply_model(x, t); current_patcher; diffusion_model; encode_adm(); extra_conds();
        get_dtype(); latent_format; latent_shapes?; load_model_weights(sd, unet_prefix); manual_cast_dtype;
        memory_required(input_shape); model_config; process_latent_in(latent); state_dict_for_saving
    ModelType: EPS; V_PREDICTION
comfy.model_management
    InterruptProcessingException; current_loaded_models; free_memory(memory_required, device); get_free_memory(dev);
        get_torch_device(); intermediate_device(); interrupt_current_processing(value);
        load_models_gpu(models, *, memory_required); processing_interrupted(); soft_empty_cache();
        throw_exception_if_processing_interrupted(); unet_dtype(*, model_params, supported_dtypes, weight_dtype);
        unet_manual_cast(weight_dtype, inference_device, supported_dtypes); unet_offload_device();
        unload_all_models()
    LoadedModel: model; model_unload()
comfy.model_patcher
    CoreModelPatcher?; ModelPatcher(model, load_device, offload_device, size);
        create_model_options_clone(orig_model_options)
    ModelPatcher: additional_models; attachments; cached_hook_patches; cached_patcher_init?; callbacks; cleanup();
        clone(); current_hooks; add_hook_patches(hook, patches); add_patches(patches); detach();
        get_additional_models(); get_additional_models_with_key(key); get_key_patches(filter_prefix);
        get_model_object(name); get_non_dynamic_delegate?; hook_mode; hook_patches; injections; is_clone(other);
        is_dynamic?; load_device; model; model_dtype(); model_options; model_size(); model_state_dict();
        model_state_dict_for_saving?; object_patches; offload_device; parent; patch_hooks(hooks); patches;
        patches_uuid; pre_run(); restore_hook_patches(); set_additional_models(key, models); weight_wrapper_patches;
        wrappers
comfy.model_sampling
    CONST; COSMOS_RFLOW; EDM; EPS; IMG_TO_IMG; ModelSamplingDiscrete(*, zsnr); V_PREDICTION; X0
    ModelSamplingDiscrete: percent_to_sigma(percent); sigma_max; sigma_min
comfy.ops
    CastWeightBiasOp; cast_bias_weight(s, input, *, offloadable);
        uncast_bias_weight(s, weight, bias, offload_stream)
comfy.patcher_extension
    add_wrapper_with_key(wrapper_type, key, wrapper, transformer_options, *, is_model_options)
    WrappersMP: APPLY_MODEL; CALC_COND_BATCH; DIFFUSION_MODEL; OUTER_SAMPLE; PREDICT_NOISE; PREPARE_SAMPLING;
        SAMPLER_SAMPLE
comfy.sample
    fix_empty_latent_channels(model, latent_image); prepare_noise(latent_image, seed, noise_inds)
comfy.sampler_helpers
    cleanup_additional_models(models); convert_cond(cond); get_additional_models_from_model_options(model_options);
        prepare_model_patcher(model, conds, model_options)
comfy.samplers
    CFGGuider(model_patcher); KSampler(model, steps, device, sampler, scheduler, denoise, model_options);
        apply_empty_x_to_equal_area(conds, uncond, name, uncond_fill_func);
        calc_cond_batch(model, conds, x_in, timestep, model_options);
        cast_to_load_options(model_options, *, device, dtype);
        cfg_function(model, cond_pred, uncond_pred, cond_scale, x, timestep, *, model_options, cond, uncond);
        filter_registered_hooks_on_conds(conds, model_options); get_total_hook_groups_in_conds(conds);
        preprocess_conds_hooks(conds);
        process_conds(model, noise, conds, device, latent_image, denoise_mask, seed, *, latent_shapes);
        sampler_object(name)
    CFGGuider: cfg; conds; inner_model;
        inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed);
        inner_set_conds(conds); loaded_models; model_patcher; model_options; original_conds;
        outer_sample(noise, latent_image, sampler, sigmas); predict_noise(x, timestep, model_options, seed);
        sample(noise, latent_image, sampler, sigmas, *, denoise_mask, callback, disable_pbar, seed); set_cfg(cfg)
    KSampler: SAMPLERS; SCHEDULERS; sigmas
    Sampler: sample()
comfy.sd
    CLIP(target, *, embedding_directory, parameters); VAE(*, sd, config);
        load_checkpoint_guess_config(ckpt_path, *, output_vae, output_clip);
        load_diffusion_model(unet_path, *, model_options);
        load_lora_for_models(model, clip, lora, strength_model, strength_clip)
    CLIP: cond_stage_model; encode_from_tokens(tokens, *, return_pooled); layer_idx; load_sd(sd); tokenize(text)
    VAE: downscale_ratio; first_stage_model; latent_channels; latent_dim; process_input; upscale_ratio; vae_dtype
comfy.sd1_clip
    SD1ClipModel; SD1Tokenizer;
        SDClipModel(*, device, dtype, model_options, textmodel_json_config, return_projected_pooled)
comfy.supported_models
    models
comfy.supported_models_base
    BASE(unet_config); ClipTarget(tokenizer, clip)
    BASE: get_model(state_dict, prefix); latent_format; matches(unet_config, state_dict); memory_usage_factor;
        model_type(state_dict, prefix); optimizations; sampling_settings;
        set_inference_dtype(dtype, manual_cast_dtype); supported_inference_dtypes; unet_config; unet_extra_config
    ClipTarget: params
comfy.utils
    PROGRESS_BAR_ENABLED; ProgressBar(total); load_torch_file(ckpt); weight_dtype(sd)
    ProgressBar: current; total; update(value); update_absolute(value, total, preview)
comfy_api.latest
    ComfyExtension
    io: ComfyNode; Custom; Hidden.prompt; Input; NodeOutput; Schema; Boolean.Input; Clip.Input; Clip.Output;
        Combo.Input; Conditioning.Input; Float.Input; Guider.Output; Image.Input; Image.Output; Int.Input; Latent.Input;
        Latent.Output; Model.Input; Model.Output; String.Input; String.Output; Vae.Input; Vae.Output
    ui: PreviewImage(image, *, cls); PreviewText
comfy_execution.graph_utils
    ExecutionBlocker(message)
comfy_execution.utils
    get_executing_context()
    ExecutionContext: node_id
folder_paths
    folder_names_and_paths; get_filename_list(folder_name); get_folder_paths(folder_name);
        get_full_path(folder_name, filename); get_input_directory(); get_output_directory();
        get_system_user_directory(name); get_temp_directory(); models_dir; supported_pt_extensions
latent_preview
    prepare_callback(model, steps)
server
    PromptServer: instance?; send_progress_text(text, node_id)
"""


def _read(text: str) -> dict[str, tuple[str, ...]]:
    """The list by module, with the class in front of each attribute."""
    modules: dict[str, list[str]] = {}
    module = owner = ""
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            module, owner = line, ""
            continue
        if not line.startswith(" " * 8):  # else a continued line
            owner, colon, rest = line.strip().rpartition(": ")
            owner, line = (f"{owner}.", rest) if colon else ("", line)
        names = (name.strip() for name in line.split(";"))
        modules.setdefault(module, []).extend(f"{owner}{name}" for name in names if name)
    return {module: tuple(names) for module, names in modules.items()}


TOUCHED = _read(_LIST)
