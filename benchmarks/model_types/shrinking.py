"""Tiny configs: the default one of a type, with fewer and narrower layers, and a small vocabulary.

There are four recipes, of which the first one that gives a working model is taken:

- ``named``: every width is 64 and every head 16 wide, whatever they were. The smallest, for most text models.
- ``scaled``: widths are an eighth of what they were, with as many heads. Keeps what widths have to do with each other.
- ``shallow``: widths as they were, two layers.
- ``deep``: widths as in ``named``, as many layers as there were.
"""

import re
from dataclasses import MISSING, fields

from transformers import PreTrainedConfig

from benchmarks.model_types.overrides import OVERRIDES

RECIPES = ("named", "scaled", "shallow", "deep")
VOCABULARY = 320
MAX_POSITIONS = 512
SCALE = 8

# The first rule whose pattern is found in a field's name says what kind of number it is.
KINDS = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"kernel|stride|num_channels$|audio_channels$|in_channels|in_chans", "kept"),
        (r"num_feat_extract_layers|num_conv|_layer_id$|window_layers|lstm_layers", "kept"),
        (r"kv_shared_layers|nextn_predict_layers|num_mtp", "none"),
        (r"first_k_dense_replace|num_dense_layers", "one"),
        (r"mm_tokens_per_image", "few"),
        (r"(^|_)image_size$|^img_size$|^crop_size$", "image"),
        (r"vocab_size|vocabulary_size|num_embeds$|^num_embeddings$", "vocabulary"),
        (r"(^|_)(max_position_embeddings|n_positions|max_positions|max_(source|target)_positions)$", "positions"),
        (r"depths$|^num_block_repeats|blocks_per_stage|stage_num_blocks", "depths"),
        (r"(^|_)(layers?|depth|num_blocks|n_layer)$|num_layers|num_hidden_layers", "layers"),
        (r"key_value_heads|kv_heads", "kv_heads"),
        (r"heads?(_per_stage)?$|attention_heads|n_head", "heads"),
        (r"head_dim|d_kv$|head_size|dim_head|d_head$|linear_.*_dim$|kv_channels", "head_width"),
        (r"lora_rank|lora_dim", "lora"),
        (r"experts_per_tok|top_?k(_experts)?$|num_selected_experts|moe_k$|router_top_k", "top_k"),
        (r"n_group|topk_group|num_expert_group", "one"),
        (r"(num|n)_(\w+_)?experts$|^num_experts", "experts"),
        (
            r"moe_.*intermediate|expert.*intermediate|intermediate.*expert|moe_\w*dim|expert_\w*(dim|size)",
            "narrow_inner",
        ),
        (r"intermediate|ffn|d_ff$|n_inner|mlp_dim|feed_?forward|ff_dim", "inner"),
        (
            r"hidden|embed|d_model|n_embd|emb_dim|^dim$|_dim$|dims$|channels$|width|projection|conv_dim|codevector"
            r"|upsample_groups",
            "width",
        ),
    )
]
NAMED = {"width": 64, "inner": 128, "narrow_inner": 32, "head_width": 16, "lora": 32, "heads": 4}
_LEAST = {"width": 16, "inner": 8, "narrow_inner": 8, "head_width": 4, "lora": 4, "heads": 4}  # less is something else
WIDTHS = {"width", "inner", "narrow_inner", "head_width", "lora"}
AT_MOST = {
    "none": 0,
    "one": 1,
    "few": 4,
    "image": 224,
    "vocabulary": VOCABULARY,
    "positions": MAX_POSITIONS,
    "layers": 2,
    "depths": 1,
    "experts": 4,
    "top_k": 2,
}


def shrunk(config_class, recipe, given=None):
    """Return a small config of a class, with all configs in it.

    Args:
        config_class: Of transformers.
        recipe: See the module.
        given: Arguments that its owner gives it.
    """
    given = dict(given or {})
    values = dict(given)
    default = config_class(**given)
    specs = config_class.sub_configs_defaults
    for field in fields(config_class):
        value = given.get(field.name, _default_of(field))
        if field.name in specs or field.name in _BASE_FIELDS:
            continue
        small = smaller(field.name, value, recipe)
        if small != value:
            values[field.name] = small
    for name, held in vars(default).items():
        if isinstance(held, PreTrainedConfig):
            values[name] = shrunk(type(held), recipe, specs[name].init_kwargs if name in specs else None)
    values = _with_stages_inside(default, _with_token_ids_inside(default, values))
    override = OVERRIDES.get(config_class.model_type, {})
    config = config_class(**values | (override(values) if callable(override) else override))
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


_BASE_FIELDS = {field.name for field in fields(PreTrainedConfig)}


def _default_of(field):
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def smaller(name, value, recipe):
    """Return what a field of this name becomes."""
    kind = next((kind for pattern, kind in KINDS if pattern.search(name)), None)
    if isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value):
        return type(value)(_smaller_entry(kind, entry, recipe, max(value)) for entry in value)
    if name == "rope_parameters" and isinstance(value, dict):
        return {key: _smaller_sections(key, entry, recipe) for key, entry in value.items()}
    if type(value) is not int or value <= 0:
        return value
    if recipe == "deep":
        return value if kind in ("layers", "depths") else smaller(name, value, "named")
    if kind == "image" and recipe == "shallow":  # other numbers may go with it
        return value
    if kind in AT_MOST:
        return min(value, AT_MOST[kind])
    if recipe == "named" and kind == "kv_heads":
        return min(value, 2)
    if recipe == "named" and kind in NAMED:
        return NAMED[kind] if value > _LEAST[kind] else value
    return _scaled(value) if recipe == "scaled" and kind in WIDTHS else value


def _smaller_entry(kind, value, recipe, largest):
    """Return an entry of a list: these have one for each stage, whose ratios matter."""
    if kind == "depths" and recipe != "deep":
        return min(value, 1)
    if recipe == "shallow" or kind not in WIDTHS or largest <= SCALE * 4:
        return value
    return _scaled(value)


def _scaled(value):
    return value if value <= SCALE else max(SCALE, value // SCALE)


def _smaller_sections(key, value, recipe):
    """Return how many frequencies each axis of a position has; together they are half a head."""
    if key != "mrope_section" or recipe == "shallow":
        return value
    return [2, 3, 3] if recipe in ("named", "deep") else [entry // SCALE for entry in value]


def _with_token_ids_inside(default, values):
    """Move ids of special tokens into the small vocabulary; equal ones stay equal, in all configs of a model."""
    names = [
        field.name for field in fields(type(default)) if re.search(r"_token(_id|_index)?$|_token_ids$", field.name)
    ]
    for name in names:
        value = getattr(default, name, None)
        if type(value) is int and value >= VOCABULARY // 2:
            values[name] = _small_id(value)
        elif isinstance(value, list) and value and all(type(entry) is int for entry in value):
            values[name] = [entry if entry < VOCABULARY // 2 else _small_id(entry) for entry in value]
    return values


def _with_stages_inside(default, values):
    """Give a backbone as many layers as there are to return."""
    indices = getattr(default, "out_indices", None)
    if indices and "num_hidden_layers" in values and max(indices) > values["num_hidden_layers"]:
        count = len(indices)
        values |= {"num_hidden_layers": count, "out_indices": list(range(1, count + 1))}
        values.pop("out_features", None)
    return values


def _small_id(value):
    # A prime, so that neighbours stay apart.
    return VOCABULARY // 2 + value % 151
