"""What the generic rules of `shrinking` do not know about single types: fields, or a function of the other fields."""

_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _rope(kind, **parameters):
    """Return rotary embeddings, for heads 16 wide."""
    return {"rope_parameters": {**_DEFAULT_ROPE, "rope_type": kind, **parameters}, "head_dim": 16}


def _mrope(*sections):
    """Return rotary embeddings of several axes."""
    return _rope("default", mrope_section=list(sections))


# Images of 1024 x 1024, in a tower whose sizes have to go with those of two other configs.
_SAM_TOWER = {"image_size": 128, "num_pos_feats": 32}
_SAM_PROMPTS = {"image_size": 128, "image_embedding_size": 8}


def _resnet(*stages):
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return {
        "backbone_config": {"model_type": "resnet", **sizes, "out_features": [f"stage{stage}" for stage in stages]}
    }


_SAM2_TOWER = {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
_HIERA = {
    "image_size": [128, 128],
    "hidden_size": 16,
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "blocks_per_stage": [1, 1, 2, 1],
    "global_attention_blocks": [],
}
_IMAGE_OF_128 = {"image_size": 128}
_SAM2 = ("sam2", "sam2_video", "edgetam", "edgetam_video")
_TWO_STAGES = {
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
_VIBEVOICE_TOKENIZERS = [f"vibevoice_acoustic_tokenizer{part}" for part in ("", "_encoder", "_decoder")]
_FEW_FILTERS = {"num_filters": 2}
_THREE_AXES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm_image", "glm_ocr"),
    *("cosmos3_edge", "hy_v4_vl", "paddleocr_vl"),
)
_IMAGE, _END_OF_ROW, _FIRST_CODE, _CODES = 318, 317, 200, 32
_CHAMELEON_CODES = {
    f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z": _FIRST_CODE + code
    for code in range(_CODES)
}
_EMU3_CODES = {f"<|visual token {code:06}|>": _FIRST_CODE + code for code in range(_CODES)}
# Pieces of 48 x 48 pixels of an image, at three sizes.
_DINOV2_OF_PIECES = {
    "model_type": "dinov2",
    "image_size": 48,
    "patch_size": 6,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VITDET = {
    "model_type": "vitdet",
    "num_channels": 4,
    "image_size": 64,
    "pretrain_image_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "out_features": ["stage2"],
}

OVERRIDES = {
    # Their default backbone is timm's.
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "table-transformer"), _resnet(4)),
    "deformable_detr": _resnet(2, 3, 4),
    "sam_vision_model": _SAM_TOWER,
    "sam_hq_vision_model": _SAM_TOWER,
    "sam_prompt_encoder": _SAM_PROMPTS,
    "sam_hq_prompt_encoder": _SAM_PROMPTS,
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _SAM2_TOWER,
    **dict.fromkeys(("sam2_video", "edgetam_video"), _IMAGE_OF_128),
    **dict.fromkeys((f"{name}_prompt_encoder" for name in _SAM2), _IMAGE_OF_128),
    "sam3_vit_model": {"image_size": 224, "pretrain_image_size": 112, "window_size": 8},
    "sam3_vision_model": {"backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]]},
    "sam3_tracker_prompt_encoder": {"image_size": 224},
    "slanext": {"post_conv_in_channels": 64},
    "slanext_vision": {"image_size": 128, "output_channels": 64},
    "align": {"projection_dim": 24},
    "align_vision_model": {"image_size": 64, "hidden_dim": 24, **_TWO_STAGES},
    "perceiver": {"num_self_attends_per_block": 2, "d_latents": 64, "d_model": 64, "num_latents": 16},
    **dict.fromkeys(_VIBEVOICE_TOKENIZERS, _FEW_FILTERS),
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "blt": {"encoder_hash_byte_group_vocab": 320},
    "blip-2": {"image_token_index": 319},
    "instructblip": {"image_token_index": 319},
    "instructblipvideo": {"video_token_index": 319},
    "chameleon": {"vocabulary_map": {"<image>": _IMAGE, **_CHAMELEON_CODES}},
    "chameleon_vqgan": {"num_embeddings": _CODES, "base_channels": 32},
    "emu3": {"vocabulary_map": {"<image>": _IMAGE, "<|extra_200|>": _END_OF_ROW, **_EMU3_CODES}},
    "emu3_vqgan": {"codebook_size": _CODES, "base_channels": 32, "hidden_size": 128},
    "clvp_encoder": {"bos_token_id": 255, "num_attention_heads": 2},
    "clvp_decoder": {"vocab_size": 256},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "llama4_vision_model": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256},
    "depth_pro": {
        "patch_size": 48,
        **dict.fromkeys(("image_model_config", "patch_model_config", "fov_model_config"), _DINOV2_OF_PIECES),
        "intermediate_hook_ids": [1, 0],
        "merge_padding_value": 1,
    },
    "vitmatte": {
        "backbone_config": _VITDET,
        "hidden_size": 64,
        "convstream_hidden_sizes": [8, 16, 24],
        "fusion_hidden_sizes": [32, 24, 16, 8],
    },
    "zoedepth": {"bottleneck_features": 64, "fusion_hidden_size": 64},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "seggpt": {
        "image_size": [64, 32],
        "pretrain_image_size": 32,
        "num_hidden_layers": 4,
        "intermediate_hidden_state_indices": [0, 1, 2, 3],
        "merge_index": 0,
    },
    "lw_detr_vit": {"image_size": 256},
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "num_queries": 16,
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "image_size": 256,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "window_block_indices": [0],
            "out_indices": [1, 2],
        },
    },
    "rf_detr": {"num_queries": 16},
    "step3p5": {"sliding_window": 8},
    "xmod": {"default_language": "en_XX"},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "granite_docling_vision": {"image_size": 256},
    "gemma4_audio": {"subsampling_conv_channels": [128, 4]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
    },
    **dict.fromkeys((f"{name}_text" for name in _THREE_AXES), _mrope(2, 3, 3)),
    "glm4v_moe_text": _mrope(1, 1, 2),
    "ernie4_5_vl_moe_text": _mrope(3, 3, 2),
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), _rope("dynamic", alpha=1.0, factor=1.0)),
    "hunyuan_vl_text": _mrope(2, 2, 2, 2),
    "ministral": _rope("default"),
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 2, "index_topk": 4},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "cohere_compass_text": {
        "rope_parameters": {kind: dict(_DEFAULT_ROPE) for kind in ("full_attention", "sliding_attention")}
    },
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
}
