"""Which positions count: a mask belongs to the inputs that it came with, and to what has their positions."""

import pytest
import torch
import transformers
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from peft_jactus import JactusConfig, calibrate

DIM = 8
COMMON = {"hidden_size": DIM, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
LENGTHS = [10, 4]  # of two texts, padded to 10
END = 39  # of a text


def mask_of(lengths, longest):
    return torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])


MASK = mask_of(LENGTHS, 10)
REAL = sum(LENGTHS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ids(*shape):
    return torch.randint(3, 38, shape)


def text_batch():
    """Return two texts whose last token ends them: CLIP reads their meaning there."""
    tokens = ids(*MASK.shape)
    tokens[[0, 1], [length - 1 for length in LENGTHS]] = END
    return {"input_ids": tokens, "attention_mask": MASK}


def tiny_clip():
    text = transformers.CLIPTextConfig(vocab_size=40, max_position_embeddings=12, eos_token_id=END, **COMMON)
    vision = transformers.CLIPVisionConfig(image_size=6, patch_size=2, **COMMON)  # 9 patches and one for the class
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=DIM)
    )


def tiny_siglip():
    text = transformers.SiglipTextConfig(vocab_size=40, max_position_embeddings=12, **COMMON)
    vision = transformers.SiglipVisionConfig(image_size=10, patch_size=2, **COMMON)  # 25 patches
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    )


def counted(model, features, **options):
    batch = text_batch() | {"return_loss": True} | features
    return counts_of(model, batch, **options)


def counts_of(model, batch, *, exclude=None, **options):
    """Return how many positions each layer counts that counts any."""
    config = JactusConfig(target_modules="all-linear", exclude_modules=exclude)
    statistics = calibrate(model.eval(), config, [batch], progress_bar=False, **options)
    return {name: layer.num_tokens for name, layer in statistics.items() if layer.num_tokens}


def from_states(model, batch):
    """Return the loss of a model that has none."""
    return model(**batch)[0].square().mean()


STATES = {"loss_fn": from_states, "loss_reduction": "sum", "leave_unusable_dense": True}


def having(counts, *parts):
    return {count for name, count in counts.items() if all(part in name for part in parts)}


def in_blocks(counts, tower):
    return {count for name, count in counts.items() if name.startswith(tower) and "layers." in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_many_patches_as_tokens_are_all_counted(dtype):
    counts = counted(tiny_clip().to(dtype), {"pixel_values": torch.randn(2, 3, 6, 6)})
    assert in_blocks(counts, "vision_model") == {20}
    assert in_blocks(counts, "text_model") == {sum(LENGTHS)}


def test_other_numbers_of_patches_are_counted_without_a_word(caplog):
    counts = counted(
        tiny_siglip(),
        {"pixel_values": torch.randn(2, 3, 10, 10)},
        exclude=["out_proj", "fc1", "fc2", "head"],
        leave_unusable_dense=True,
    )
    vision = {count for name, count in counts.items() if name.startswith("vision_model.encoder")}
    assert vision == {50}
    assert "its padding is counted" not in caplog.text


def test_masks_of_a_language_model_with_images_are_those_of_its_text():
    text = transformers.LlamaConfig(vocab_size=40, **COMMON)
    vision = transformers.CLIPVisionConfig(image_size=6, patch_size=2, **COMMON)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 38, (2, 14))
    ids[:, :9] = 39  # the patches
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    batch = {
        "input_ids": ids, "attention_mask": mask, "labels": ids, "pixel_values": torch.randn(2, 3, 6, 6),
    }  # fmt: skip
    counts = counts_of(model, batch, leave_unusable_dense=True)
    language = {count for name, count in counts.items() if "language_model.layers" in name}
    assert language == {26}
    assert {count for name, count in counts.items() if "vision_tower" in name and "layers." in name} == {20}
    assert {count for name, count in counts.items() if "multi_modal_projector" in name} == {18}


def tiny_idefics(name):
    """Return a model of which an image has 9 patches, and is one token of a text; and two texts of 9."""
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION[name](image_size=18, patch_size=6, **COMMON).to_dict(),
        text_config=transformers.LlamaConfig(vocab_size=40, **COMMON).to_dict(),
        image_token_id=END,
        **({"perceiver_config": PERCEIVER} if name == "Idefics2" else {"scale_factor": 3}),
    )
    tokens = ids(2, 9)  # as many as an image has patches
    tokens[:, 0] = END
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), tokens


VISION = {"Idefics2": Idefics2VisionConfig, "Idefics3": Idefics3VisionConfig, "SmolVLM": SmolVLMVisionConfig}
PERCEIVER = {
    "hidden_size": DIM, "resampler_n_latents": 1, "resampler_depth": 1, "resampler_n_heads": 2,
    "resampler_head_dim": 4, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_images_that_are_reshaped_on_their_way_are_counted_in_full(name):
    model, tokens = tiny_idefics(name)
    batch = {"input_ids": tokens, "attention_mask": mask_of([9, 4], 9), "pixel_values": torch.randn(2, 1, 3, 18, 18)}
    counts = counts_of(model, batch | {"labels": tokens}, leave_unusable_dense=True)
    assert having(counts, "vision_model.encoder") == {18}
    assert having(counts, "text_model.layers") == {13}


def test_images_in_several_tiles_are_counted_without_a_word(caplog):
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=6, patch_size=2, **COMMON),
        text_config=transformers.LlamaConfig(vocab_size=40, **COMMON),
        image_token_index=END,
        image_grid_pinpoints=[[6, 6]],
        vision_feature_layer=-1,
    )
    tokens = ids(2, 26)
    tokens[:, :21] = END  # 9 patches of the whole, 9 of its one tile, and 3 ends of lines
    batch = {
        "input_ids": tokens, "attention_mask": mask_of([26, 23], 26), "labels": tokens,
        "pixel_values": torch.randn(2, 2, 3, 6, 6), "image_sizes": torch.tensor([[6, 6]] * 2),
    }  # fmt: skip
    model = transformers.LlavaNextForConditionalGeneration(config)
    counts = counts_of(model, batch, leave_unusable_dense=True)
    assert having(counts, "vision_tower", "layers.") == {2 * 2 * 10}
    assert having(counts, "multi_modal_projector") == {2 * 2 * 9}
    assert having(counts, "language_model.layers") == {26 + 23}
    assert not misfits(caplog)


def misfits(caplog):
    return [record for record in caplog.records if "position_masks" in record.name]


def test_text_beside_learned_queries_keeps_its_mask(caplog):
    """InstructBLIP: queries and text run together through attention, and apart through the rest."""
    small = {"encoder_hidden_size": DIM, "vocab_size": 40, "cross_attention_frequency": 1}
    config = transformers.InstructBlipConfig(
        vision_config=transformers.InstructBlipVisionConfig(image_size=6, patch_size=2, **COMMON).to_dict(),
        qformer_config=transformers.InstructBlipQFormerConfig(**small, **COMMON | {"num_hidden_layers": 2}).to_dict(),
        text_config=transformers.LlamaConfig(vocab_size=40, **COMMON).to_dict(),
        num_query_tokens=5,
        image_token_index=END,
    )
    batch = text_batch()
    batch["input_ids"] = ids(2, 10)
    batch["input_ids"][:, :5] = END
    batch["attention_mask"] = mask_of([10, 7], 10)
    batch |= {"pixel_values": torch.randn(2, 3, 6, 6), "labels": batch["input_ids"]}
    batch |= {"qformer_input_ids": ids(2, 6), "qformer_attention_mask": mask_of([6, 2], 6)}
    model = transformers.InstructBlipForConditionalGeneration(config)
    counts = counts_of(model, batch, leave_unusable_dense=True)
    assert having(counts, "qformer", "attention.attention") - having(counts, "crossattention") == {10 + 8}
    assert having(counts, "qformer", "_query") == {10}
    assert having(counts, "qformer", "intermediate.") | having(counts, "qformer", "output.dense") >= {8}
    assert having(counts, "qformer", "crossattention", "key") == {20}
    assert having(counts, "language_model", "layers.") == {17}
    assert not misfits(caplog)


def test_positions_that_read_text_by_attention_are_not_its_own(caplog):
    """LXMERT, with as many regions as tokens: whose they are cannot be told for sure, so all count."""
    sizes = {"l_layers": 1, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 12, "max_position_embeddings": 12}
    shape = {name: value for name, value in COMMON.items() if name != "num_hidden_layers"}
    model = transformers.LxmertModel(transformers.LxmertConfig(vocab_size=40, **sizes, **shape))
    batch = text_batch() | {"visual_feats": torch.randn(2, 10, 12), "visual_pos": torch.rand(2, 10, 4)}
    counts = counts_of(model, batch, loss_fn=both_states, loss_reduction="sum", leave_unusable_dense=True)
    assert having(counts, "visn") == having(counts, "r_layers") == {20}
    assert having(counts, "encoder.layer") == having(counts, "lang_") == {REAL}
    assert any("visn_inter" in record.getMessage() for record in misfits(caplog))


def both_states(model, batch):
    output = model(**batch)
    return output[0].square().mean() + output[1].square().mean()


# -- sound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relative_key", "relative"])
def test_the_mask_of_sound_is_that_of_its_frames(kind, caplog):
    config = transformers.Wav2Vec2BertConfig(
        feature_projection_input_dim=12,
        conv_depthwise_kernel_size=3,
        position_embeddings_type=kind,
        **COMMON,
    )
    batch = {"input_features": torch.randn(2, 10, 12), "attention_mask": MASK}
    counts = counts_of(transformers.Wav2Vec2BertModel(config), batch, **STATES)
    positions = having(counts, "linear_pos")  # one for each distance, and no padding
    assert positions == ({19} if kind == "relative" else set())
    assert set(counts.values()) - positions == {REAL}
    assert not misfits(caplog)


CONVOLUTIONS = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "UniSpeechSat", "Data2VecAudio"])
def test_the_mask_of_sound_is_shortened_as_the_model_shortens_it(name, caplog):
    config = getattr(transformers, f"{name}Config")(**CONVOLUTIONS, **COMMON)
    batch = {"input_values": torch.randn(2, 200), "attention_mask": mask_of([200, 100], 200)}
    counts = counts_of(getattr(transformers, f"{name}Model")(config), batch, **STATES)
    # 200 samples: 39 frames of the first convolution, 19 of the second one; 100 samples: 19 and 9
    assert set(counts.values()) == {19 + 9}
    assert not misfits(caplog)


def test_padding_of_a_shortened_input_is_counted_with_a_warning(caplog):
    config = transformers.Wav2Vec2BertConfig(
        feature_projection_input_dim=12, conv_depthwise_kernel_size=3, add_adapter=True, output_hidden_size=8, **COMMON
    )
    batch = {"input_features": torch.randn(2, 10, 12), "attention_mask": MASK}
    counts = counts_of(transformers.Wav2Vec2BertModel(config), batch, **STATES)
    assert having(counts, "encoder.layers") == {REAL}
    shortened = {name for name in counts if name.startswith("adapter")}
    assert {counts[name] for name in shortened} == {10}
    said = " ".join(record.getMessage() for record in misfits(caplog))
    assert all(name in said for name in shortened)
    assert "encoder" not in said


# -- other orders, and two masks --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 4])
def test_positions_may_come_before_rows(rows, caplog):
    """XLNet, also with as many texts as tokens."""
    config = transformers.XLNetConfig(vocab_size=40, d_model=8, n_layer=2, n_head=2, d_inner=12)
    mask = mask_of([2, 4, 3, 4][:rows], 4)
    batch = {"input_ids": ids(rows, 4), "attention_mask": mask}
    counts = counts_of(transformers.XLNetModel(config), batch, **STATES)
    assert set(counts.values()) == {int(mask.sum())}
    assert not misfits(caplog)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_of_as_many_texts_as_tokens_the_right_ones_count(order):
    """Two batches with the same texts in another order have the same sums."""
    config = transformers.XLNetConfig(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=12)
    torch.manual_seed(0)
    model = transformers.XLNetModel(config).double()
    tokens, mask = ids(4, 4)[order], mask_of([1, 4, 3, 4], 4)[order]
    other = tokens.where(mask.bool(), torch.full_like(tokens, 38))
    sums = []
    for each in (tokens, other):
        settings = JactusConfig(target_modules=["layer_1"])
        batch = {"input_ids": each, "attention_mask": mask}
        statistics = calibrate(
            model.eval(), settings, [batch], progress_bar=False, loss_fn=real_states(mask), loss_reduction="sum"
        )
        sums.append(statistics["layer.0.ff.layer_1"].input.scatter)
    torch.testing.assert_close(*sums)


def real_states(mask):
    return lambda model, batch: model(**batch)[0][mask.bool()].square().sum()


def test_several_choices_for_each_example_have_a_mask():
    model = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=40, **COMMON))
    mask = mask_of([5, 3, 4, 2], 5).reshape(2, 2, 5)
    batch = {"input_ids": ids(2, 2, 5), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    counts = counts_of(model, batch, leave_unusable_dense=True)
    assert having(counts, "encoder") == {5 + 3 + 4 + 2}
    assert having(counts, "pooler") == {4}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_source_and_target_of_one_length_have_their_own_masks(attention):
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             {"layers": 1, "ffn_dim": 12, "attention_heads": 2}.items()}  # fmt: skip
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=40, d_model=8, max_position_embeddings=12, attn_implementation=attention, **sizes
        )
    )
    labels = ids(2, 10).where(mask_of([9, 7], 10).bool(), torch.tensor(-100))
    counts = counts_of(model, text_batch() | {"labels": labels}, exclude=["lm_head"])
    assert having(counts, "model.encoder") == {REAL}
    assert having(counts, "encoder_attn", "k_proj") == having(counts, "encoder_attn", "v_proj") == {REAL}
    assert having(counts, "decoder", "self_attn") == having(counts, "encoder_attn", "q_proj") == {16}


def test_padding_among_the_tokens_of_an_expert_is_counted_with_a_warning(caplog):
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=1, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    labels = ids(2, 6)
    counts = counts_of(
        model, text_batch() | {"labels": labels}, exclude=["lm_head", "router"], leave_unusable_dense=True
    )
    assert having(counts, "encoder", "SelfAttention") >= {REAL}
    experts = {name for name in counts if name.startswith("encoder") and "expert_" in name}
    assert sum(counts[name] for name in experts if name.endswith(".wi")) == 20
    said = " ".join(record.getMessage() for record in misfits(caplog))
    assert all(name in said for name in experts)


def test_no_hook_stays():
    model = tiny_clip()
    counted(model, {"pixel_values": torch.randn(2, 3, 6, 6)})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Detector(torch.nn.Module):
    """Its encoder returns feature maps in a list, as those of RT-DETR and D-FINE."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(DIM, DIM)

        def forward(self, pixels):
            return {0: [self.layer(pixels)]}

    def __init__(self):
        super().__init__()
        self.config = transformers.PreTrainedConfig(is_encoder_decoder=True)
        self.encoder = self.Encoder()
        self.decoder = torch.nn.Linear(DIM, DIM)

    def get_encoder(self):
        return self.encoder

    def forward(self, pixels):
        return self.decoder(self.encoder(pixels)[0][0])


def test_an_encoder_may_return_a_list_of_feature_maps():
    config = JactusConfig(target_modules=["encoder.layer", "decoder"])
    batch = {"pixels": torch.randn(2, 5, DIM)}
    loss = {"loss_fn": lambda model, batch: model(**batch).square().mean(), "loss_reduction": "sum"}
    statistics = calibrate(Detector(), config, [batch], progress_bar=False, **loss)
    assert {name: layer.num_tokens for name, layer in statistics.items()} == {"encoder.layer": 10, "decoder": 10}


def pixel_mask(*sizes, size):
    """Return ``(images, size, size)``: each image fills the top left, of this height and width."""
    mask = torch.zeros(len(sizes), size, size, dtype=torch.long)
    for image, (height, width) in zip(mask, sizes, strict=True):
        image[:height, :width] = 1
    return mask


@pytest.mark.parametrize("mask_of_text", [[9, 9], [9, 4]])
@pytest.mark.parametrize("name", ["Idefics2", "Idefics3", "SmolVLM"])
def test_padded_patches_of_an_image_do_not_count(name, mask_of_text):
    mask = pixel_mask((18, 18), (12, 6), size=18)
    batch = {"pixel_values": torch.randn(2, 1, 3, 18, 18), "pixel_attention_mask": mask[:, None]}
    model, tokens = tiny_idefics(name)
    batch |= {"input_ids": tokens, "labels": tokens, "attention_mask": mask_of(mask_of_text, 9)}
    counts = counts_of(model, batch, leave_unusable_dense=True)
    assert having(counts, "vision_model.encoder") == {9 + 2}
    assert having(counts, "text_model.layers") == {sum(mask_of_text)}


def test_an_image_that_is_all_padding_does_not_count():
    mask = pixel_mask((18, 18), (12, 6), size=18)
    pixels = torch.randn(2, 2, 3, 18, 18)
    pixels[0, 0] = pixels[1, 1] = 0
    masks = torch.stack([mask.flip(0), mask.flip(0)])  # of each row's two images, one is left: all of it, and a part
    masks[0, 0] = masks[1, 1] = 0
    model, tokens = tiny_idefics("Idefics3")
    batch = {"input_ids": tokens, "labels": tokens, "pixel_values": pixels, "pixel_attention_mask": masks}
    assert having(counts_of(model, batch, leave_unusable_dense=True), "vision_model.encoder") == {9 + 2}


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_padded_pixels_do_not_count_in_what_reads_a_feature_map(name):
    backbone = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    sizes = {"d_model": DIM, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "num_queries": 5}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, **sizes, **layers
    )
    model = getattr(transformers, f"{name}Model")(config)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "pixel_mask": pixel_mask((32, 32), (16, 8), size=32)}
    counts = counts_of(model, batch, **STATES)
    assert having(counts, "encoder.layers", "self_attn") == {16 + 2}
    assert having(counts, "decoder.layers", "self_attn") == {2 * 5}


@pytest.mark.parametrize("lengths", [[10, 4], [10, 10, 2]])
def test_a_mask_that_a_model_pads_and_turns_to_its_opposite_still_says_what_is_real(lengths):
    """LED's attention in windows needs a whole number of them; it hands on where padding is."""
    config = transformers.LEDConfig(
        vocab_size=40, d_model=DIM, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, attention_window=32,
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=16,
    )  # fmt: skip
    mask = mask_of(lengths, 10)
    batch = {"input_ids": ids(*mask.shape), "attention_mask": mask, "labels": ids(len(lengths), 6)}
    counts = counts_of(transformers.LEDForConditionalGeneration(config), batch, exclude=r".*_global")
    assert having(counts, "encoder.layers.0.fc") == {sum(lengths)}


NESTED = {
    "suffix": (
        lambda texts: {f"{name}_chosen": tensor for name, tensor in texts.items()},
        lambda batch: {name.removesuffix("_chosen"): tensor for name, tensor in batch.items()},
    ),
    "one of three": (
        lambda texts: {
            f"{name}_{part}": tensor if part == "n" else torch.ones_like(tensor)
            for name, tensor in texts.items()
            for part in ("a", "p", "n")
        },
        lambda batch: {name.removesuffix("_n"): tensor for name, tensor in batch.items() if name.endswith("_n")},
    ),
    "the tenth": (
        lambda texts: {
            f"{name}_{part}": tensor if part == 10 else torch.ones_like(tensor)
            for name, tensor in texts.items()
            for part in (1, 10)
        },
        lambda batch: {name.removesuffix("_10"): tensor for name, tensor in batch.items() if name.endswith("_10")},
    ),
    "prefix": (
        lambda texts: {f"chosen_{name}": tensor for name, tensor in texts.items()},
        lambda batch: {name.removeprefix("chosen_"): tensor for name, tensor in batch.items()},
    ),
    "inside": (lambda texts: {"query": texts}, lambda batch: batch["query"]),
    "in_a_list": (lambda texts: {"features": [texts]}, lambda batch: batch["features"][0]),
    "beside_metadata": (
        lambda texts: {**texts, "ids": [{0: "a", None: "b"}], "spans": {0: torch.zeros(2, 10), 1: [(1, 2)]}},
        lambda batch: {name: batch[name] for name in ("input_ids", "attention_mask")},
    ),
    "beside_others": (
        lambda texts: {"query": texts, "input_ids": ids(2, 10), "attention_mask": torch.ones(2, 10)},
        lambda batch: batch["query"],
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_texts_of_a_loss_function_have_their_masks_wherever_they_are(name, caplog):
    """Batches of pairs, as for a reward model, or of features, as for a sentence encoder."""
    pack, unpack = NESTED[name]
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=12, **COMMON)
    texts = {"input_ids": ids(*MASK.shape), "attention_mask": MASK}

    def loss_fn(model, batch):
        return model(**unpack(batch))[0][:, 0].square().mean()

    model = transformers.BertModel(config, add_pooling_layer=False)
    counts = counts_of(model, pack(texts), loss_fn=loss_fn, loss_reduction="sum")
    assert set(counts.values()) == {REAL}
    assert caplog.text == ""


def test_a_mask_that_a_model_turns_to_its_opposite_still_says_what_is_real():
    audio = transformers.Gemma3nAudioConfig(
        hidden_size=DIM, vocab_size=4, input_feat_size=16, sscp_conv_channel_size=(4, 4), conf_num_attention_heads=2,
        conf_num_hidden_layers=1, conf_attention_chunk_size=4, conf_attention_context_left=5, conf_reduction_factor=1,
    )  # fmt: skip
    model = Sound(transformers.Gemma3nAudioEncoder(audio))
    frames = mask_of([32, 12], 32).bool()  # four to a position
    counts = counts_of(model, {"input_features": torch.randn(2, 32, 16), "input_features_mask": frames}, **STATES)
    relative = {name for name in counts if "relative_position_embedding" in name}
    assert {count for name, count in counts.items() if name not in relative} == {8 + 3}


class Sound(torch.nn.Module):
    """An encoder whose own mask is true for padding."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_features, input_features_mask):
        return self.encoder(input_features, ~input_features_mask)
