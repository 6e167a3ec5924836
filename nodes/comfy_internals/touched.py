"""Everything of ComfyUI's inside that this pack touches, so that what a new version breaks is seen in one place.

A module's names, each with the parameters relied on: "name(first, second, *, keyword)" says that the first parameters
are called so, in this order, and that the keyword is taken; a name alone is only there. "Class.name" is an attribute or
method of a class, "name?" is used where a version has it. tests/comfyui/test_touched.py compares the list with the
ComfyUI at hand, and with what the code of this package uses.
"""

from __future__ import annotations

TOUCHED: dict[str, tuple[str, ...]] = {
    "comfy.cli_args": ("args.listen",),
    "comfy.controlnet": (
        "ControlBase", "ControlBase.previous_controlnet", "ControlBase.cond_hint_original", "ControlLora",
        "T2IAdapter.control_input",
    ),
    "comfy.hooks": (
        "EnumHookMode.MinVram", "HookGroup.hooks", "HookGroup.clone()", "Hook.hook_keyframe",
        "HookKeyframeGroup.clone()",
    ),
    "comfy.latent_formats": (
        "LatentFormat", "LatentFormat.scale_factor", "LatentFormat.latent_channels", "LatentFormat.latent_dimensions",
        "LatentFormat.latent_rgb_factors", "LatentFormat.latent_rgb_factors_bias", "SD15", "SDXL",
    ),
    "comfy.ldm.modules.attention": (
        "BasicTransformerBlock", "BasicTransformerBlock.attn2", "BasicTransformerBlock.norm2",
        "BasicTransformerBlock.disable_self_attn", "CrossAttention.forward(x, context, value, mask)",
        "CrossAttention.to_q", "CrossAttention.to_k", "CrossAttention.to_v", "CrossAttention.to_out",
        "CrossAttention.heads", "CrossAttention.dim_head",
    ),
    "comfy.ldm.modules.diffusionmodules.openaimodel": ("UNetModel", "UNetModel.out", "UNetModel.dtype"),
    "comfy.lora": ("calculate_weight(patches, weight, key)",),
    "comfy.model_base": (
        "BaseModel(model_config)", "BaseModel.adm_channels", "BaseModel.apply_model(x, t)", "BaseModel.current_patcher",
        "BaseModel.diffusion_model", "BaseModel.encode_adm()", "BaseModel.extra_conds()", "BaseModel.get_dtype()",
        "BaseModel.latent_format", "BaseModel.latent_shapes?", "BaseModel.load_model_weights(sd, unet_prefix)",
        "BaseModel.manual_cast_dtype", "BaseModel.memory_required(input_shape)", "BaseModel.model_config",
        "BaseModel.process_latent_in(latent)", "BaseModel.state_dict_for_saving", "ModelType.EPS",
        "ModelType.V_PREDICTION", "SDXL", "SDXLRefiner",
    ),
    "comfy.model_management": (
        "InterruptProcessingException", "LoadedModel.model", "LoadedModel.model_unload()", "current_loaded_models",
        "free_memory(memory_required, device)", "get_free_memory(dev)", "get_torch_device()", "intermediate_device()",
        "interrupt_current_processing(value)", "load_models_gpu(models, *, memory_required)",
        "processing_interrupted()", "soft_empty_cache()", "throw_exception_if_processing_interrupted()",
        "unet_dtype(*, model_params, supported_dtypes, weight_dtype)",
        "unet_manual_cast(weight_dtype, inference_device, supported_dtypes)", "unet_offload_device()",
        "unload_all_models()",
    ),
    "comfy.model_patcher": (
        "CoreModelPatcher?", "ModelPatcher(model, load_device, offload_device, size)", "ModelPatcher.additional_models",
        "ModelPatcher.attachments", "ModelPatcher.cached_hook_patches", "ModelPatcher.cached_patcher_init?",
        "ModelPatcher.callbacks", "ModelPatcher.cleanup()", "ModelPatcher.clone()", "ModelPatcher.current_hooks",
        "ModelPatcher.add_hook_patches(hook, patches)", "ModelPatcher.add_patches(patches)", "ModelPatcher.detach()",
        "ModelPatcher.get_additional_models()", "ModelPatcher.get_additional_models_with_key(key)",
        "ModelPatcher.get_key_patches(filter_prefix)", "ModelPatcher.get_model_object(name)",
        "ModelPatcher.get_non_dynamic_delegate?", "ModelPatcher.hook_mode", "ModelPatcher.hook_patches",
        "ModelPatcher.injections", "ModelPatcher.is_clone(other)", "ModelPatcher.is_dynamic?",
        "ModelPatcher.load_device", "ModelPatcher.model", "ModelPatcher.model_dtype()", "ModelPatcher.model_options",
        "ModelPatcher.model_size()", "ModelPatcher.model_state_dict()", "ModelPatcher.model_state_dict_for_saving?",
        "ModelPatcher.object_patches",
        "ModelPatcher.offload_device", "ModelPatcher.parent", "ModelPatcher.patch_hooks(hooks)", "ModelPatcher.patches",
        "ModelPatcher.patches_uuid", "ModelPatcher.pre_run()", "ModelPatcher.restore_hook_patches()",
        "ModelPatcher.set_additional_models(key, models)", "ModelPatcher.weight_wrapper_patches",
        "ModelPatcher.wrappers", "create_model_options_clone(orig_model_options)",
    ),
    "comfy.model_sampling": (
        "CONST?", "COSMOS_RFLOW?", "EDM", "EPS", "IMG_TO_IMG?", "ModelSamplingDiscrete(*, zsnr)",
        "ModelSamplingDiscrete.percent_to_sigma(percent)", "ModelSamplingDiscrete.sigma_max",
        "ModelSamplingDiscrete.sigma_min", "V_PREDICTION", "X0",
    ),
    "comfy.ops": (
        "CastWeightBiasOp", "cast_bias_weight(s, input, *, offloadable)",
        "uncast_bias_weight(s, weight, bias, offload_stream)",
    ),
    "comfy.patcher_extension": (
        "WrappersMP.APPLY_MODEL", "WrappersMP.CALC_COND_BATCH", "WrappersMP.DIFFUSION_MODEL",
        "WrappersMP.OUTER_SAMPLE?",
        "WrappersMP.PREDICT_NOISE?",
        "WrappersMP.PREPARE_SAMPLING?", "WrappersMP.SAMPLER_SAMPLE?",
        "add_wrapper_with_key(wrapper_type, key, wrapper, transformer_options, *, is_model_options)",
    ),
    "comfy.sample": ("fix_empty_latent_channels(model, latent_image)", "prepare_noise(latent_image, seed, noise_inds)"),
    "comfy.sampler_helpers": (
        "cleanup_additional_models(models)", "convert_cond(cond)",
        "get_additional_models_from_model_options(model_options)",
        "prepare_model_patcher(model, conds, model_options)",
    ),
    "comfy.samplers": (
        "CFGGuider(model_patcher)", "CFGGuider.cfg", "CFGGuider.conds", "CFGGuider.inner_model",
        "CFGGuider.inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, "
        "seed)",
        "CFGGuider.inner_set_conds(conds)", "CFGGuider.loaded_models", "CFGGuider.model_patcher",
        "CFGGuider.model_options", "CFGGuider.original_conds",
        "CFGGuider.outer_sample(noise, latent_image, sampler, sigmas)",
        "CFGGuider.predict_noise(x, timestep, model_options, seed)",
        "CFGGuider.sample(noise, latent_image, sampler, sigmas, *, denoise_mask, callback, disable_pbar, seed)",
        "CFGGuider.set_cfg(cfg)",
        "KSampler(model, *, steps, device, sampler, scheduler, denoise, model_options)", "KSampler.SAMPLERS",
        "KSampler.SCHEDULERS", "KSampler.sigmas", "Sampler.sample()",
        "apply_empty_x_to_equal_area(conds, uncond, name, uncond_fill_func)",
        "calc_cond_batch(model, conds, x_in, timestep, model_options)",
        "cast_to_load_options(model_options, *, device, dtype)",
        "cfg_function(model, cond_pred, uncond_pred, cond_scale, x, timestep, *, model_options, cond, uncond)",
        "filter_registered_hooks_on_conds(conds, model_options)", "get_total_hook_groups_in_conds(conds)",
        "preprocess_conds_hooks(conds)",
        "process_conds(model, noise, conds, device, latent_image, denoise_mask, seed, *, latent_shapes)",
        "sampler_object(name)",
    ),
    "comfy.sd": (
        "CLIP(target, *, embedding_directory, parameters)", "CLIP.cond_stage_model",
        "CLIP.encode_from_tokens(tokens, *, return_pooled)", "CLIP.layer_idx", "CLIP.load_sd(sd)",
        "CLIP.tokenize(text)",
        "VAE(*, sd, config)", "VAE.downscale_ratio", "VAE.first_stage_model", "VAE.latent_channels", "VAE.latent_dim",
        "VAE.process_input", "VAE.upscale_ratio", "VAE.vae_dtype",
        "load_checkpoint_guess_config(ckpt_path, *, output_vae, output_clip)",
        "load_diffusion_model(unet_path, *, model_options)",
        "load_lora_for_models(model, clip, lora, strength_model, strength_clip)",
    ),
    "comfy.sd1_clip": (
        "SD1ClipModel", "SD1Tokenizer",
        "SDClipModel(*, device, dtype, model_options, textmodel_json_config, return_projected_pooled)",
    ),
    "comfy.supported_models": ("models",),
    "comfy.supported_models_base": (
        "BASE(unet_config)", "BASE.get_model(state_dict, prefix)", "BASE.latent_format",
        "BASE.matches(unet_config, state_dict)",
        "BASE.memory_usage_factor", "BASE.model_type(state_dict, prefix)", "BASE.optimizations",
        "BASE.sampling_settings",
        "BASE.set_inference_dtype(dtype, manual_cast_dtype)", "BASE.supported_inference_dtypes", "BASE.unet_config",
        "BASE.unet_extra_config", "ClipTarget(tokenizer, clip)", "ClipTarget.params",
    ),
    "comfy.utils": (
        "PROGRESS_BAR_ENABLED", "ProgressBar(total)", "ProgressBar.current", "ProgressBar.total",
        "ProgressBar.update(value)", "ProgressBar.update_absolute(value, total, preview)", "load_torch_file(ckpt)",
        "weight_dtype(sd)",
    ),
    "comfy_api.latest": (
        "ComfyExtension", "io.Boolean.Input", "io.Clip.Input", "io.Clip.Output", "io.Combo.Input", "io.ComfyNode",
        "io.Conditioning.Input", "io.Custom", "io.Float.Input", "io.Guider.Output", "io.Hidden.prompt",
        "io.Image.Input", "io.Image.Output", "io.Input", "io.Int.Input", "io.Latent.Input", "io.Latent.Output",
        "io.Model.Input", "io.Model.Output", "io.NodeOutput", "io.Schema", "io.String.Input", "io.String.Output",
        "io.Vae.Input", "io.Vae.Output", "ui.PreviewImage(image, *, cls)", "ui.PreviewText",
    ),
    "comfy_execution.graph_utils": ("ExecutionBlocker(message)",),
    "comfy_execution.utils": ("ExecutionContext.node_id", "get_executing_context()"),
    "folder_paths": (
        "folder_names_and_paths", "get_filename_list(folder_name)", "get_folder_paths(folder_name)",
        "get_full_path(folder_name, filename)", "get_input_directory()", "get_output_directory()",
        "get_system_user_directory(name)", "get_temp_directory()",
        "models_dir", "supported_pt_extensions",
    ),
    "latent_preview": ("prepare_callback(model, steps)",),
    "server": ("PromptServer.instance?", "PromptServer.send_progress_text(text, node_id)"),
}  # fmt: skip
