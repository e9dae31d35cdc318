"""Something for a model to read: by the names of what its ``forward`` takes, and by its config."""

import inspect
import itertools
import re

import torch

ROWS = 2
LENGTH = 10
TARGET_LENGTH = 6
FRAMES = 64
SAMPLES = 4000
# Which names hold the labels' shape, by what the Auto class's name ends with.
SEQUENCES = ("CausalLM", "ImageTextToText", "MultimodalLM", "MaskedLM", "TokenClassification")
TARGETS = ("Seq2SeqLM", "SpeechSeq2Seq", "CTC")
CLASSES = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")


def find(config, *names, default=None):
    """Return the first of these settings that a config or one inside it has."""
    for name, held in itertools.product(names, _configs_in(config)):
        value = vars(held).get(name)
        if value is not None:
            return value
    return default


def _configs_in(config):
    yield config
    for name in ("text_config", "decoder", "vision_config", "audio_config", "encoder"):
        if hasattr(vars(config).get(name), "to_dict"):
            yield from _configs_in(vars(config)[name])
    for name, held in vars(config).items():
        if hasattr(held, "to_dict") and hasattr(held, "model_type"):
            yield from _configs_in(held) if name not in ("text_config", "vision_config") else ()


class Inputs:
    """Makes batches for one model.

    Args:
        model: Of transformers.
        auto_name: Name of its Auto class, which says what its labels are.
    """

    def __init__(self, model, auto_name):
        self.model = model
        self.config = model.config
        self.auto_name = auto_name
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(0)

    def batches(self, special=None):
        """Yield batches that the model may take, the fullest first; before them a special one, if there is one."""
        labels = self.labels()
        if special is not None:
            yield from self._with_and_without(special, labels)
        sets = list(self.name_sets())
        for names in sets:
            choices = [self.choices(name) for name in names]
            for values in itertools.islice(itertools.product(*choices), 8):
                yield from self._with_and_without(dict(zip(names, values, strict=True)), labels)
        if special is None and not sets:
            yield dict(self.model.dummy_inputs)

    def _with_and_without(self, batch, labels):
        if labels:
            yield self._finished(batch | labels)
        yield self._finished(batch)

    def name_sets(self):
        """Yield names of inputs: the usual ones, those that have to be there, one alone, without sounds, and all."""
        known = [name for name in self.parameters if self.choices(name)]
        needed = [name for name, each in self.parameters.items() if each.default is inspect.Parameter.empty]
        main = self.model.main_input_name
        needed = [*(main if isinstance(main, list) else [main]), *needed]
        needed = [name for name in dict.fromkeys(needed) if name in known]
        usual = [name for name in known if name in USUAL or name in needed]
        sets = [usual, needed, ["input_ids"], ["pixel_values"], ["input_features"], ["input_values"]]
        sets += [[name for name in usual if name != "input_features"], [name for name in known if name not in NEVER]]
        yield from dict.fromkeys(tuple(names) for names in sets if names and set(names) <= set(known))

    def choices(self, name):
        """Return values that an input of this name may have; none if the name means nothing here."""
        maker = MAKERS.get(name)
        return maker(self) if maker and name in self.parameters else []

    def labels(self):
        """Return what makes the model return a loss of its own."""
        if {"start_positions", "end_positions"} <= set(self.parameters):
            return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
        if "return_loss" in self.parameters:
            return {"return_loss": True}
        if "labels" not in self.parameters:
            return {}
        if self.auto_name.endswith(SEQUENCES):
            return {"labels": "input_ids"}
        if self.auto_name.endswith(TARGETS):
            return {"labels": self.ids(TARGET_LENGTH)}
        return {"labels": torch.tensor([0, 1])} if self.auto_name.endswith(CLASSES) else {}

    def _finished(self, batch):
        """Return a batch with its text as labels, where these were to be that."""
        if isinstance(batch.get("labels"), str):
            batch["labels"] = batch["input_ids"].clone() if "input_ids" in batch else self.ids(LENGTH)
        if "labels" in batch and self.auto_name.endswith(TARGETS):
            batch.pop("decoder_input_ids", None)
        return batch

    # -- tensors ------------------------------------------------------------------------------------------

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length, rows=ROWS):
        """Return ids of tokens without a meaning of their own; the last of a row ends it."""
        vocabulary = find(self.config, "vocab_size", default=32)
        vocabulary = vocabulary if isinstance(vocabulary, int) else 32
        allowed = torch.tensor([token for token in range(3, vocabulary) if token not in self.special_ids()] or [0])
        ids = allowed[torch.randint(len(allowed), (rows, length), generator=self.generator)]
        ids[:, -1] = self.ending_id(vocabulary, default=int(ids[0, -1]))
        return ids

    def ending_id(self, vocabulary, default):
        ending = find(self.config, "eos_token_id", default=default)
        ending = ending[0] if isinstance(ending, (list, tuple)) else ending
        return ending if 0 <= ending < vocabulary else default

    def special_ids(self):
        found = set()
        for held in _configs_in(self.config):
            for name, value in vars(held).items():
                if re.search(r"_token(_id|_index)?$", name) and type(value) is int:
                    found.add(value)
            found |= set((vars(held).get("vocabulary_map") or {}).values())
        return found

    def placeholder_id(self):
        """Return the id of the token in whose place an image or a sound goes."""
        names = (
            "image_token_id",
            "image_token_index",
            "audio_token_id",
            "audio_token_index",
            "media_placeholder_token_id",
        )
        return find(self.config, *names, "video_token_id", "speech_token_id", "video_token_index")

    def counts_in_config(self):
        """Return how many such places an image may have."""
        count = find(self.config, "num_query_tokens", "mm_tokens_per_image", "num_image_tokens", "image_seq_length")
        frames = find(self.config, "num_frames", "frames_per_clip", default=2)
        return [count, count * frames] if isinstance(count, int) and count <= 1024 else []

    def image_sizes(self):
        """Return sizes that an image may have: the one that the config names, or a small one."""
        size = find(self.config, "image_size", "img_size", "input_size", "crop_size")
        if isinstance(size, dict):
            size = [size.get("height", 64), size.get("width", 64)]
        if isinstance(size, int):
            size = [size, size]
        named = [tuple(size[-2:])] if size and all(16 <= side <= 1024 for side in size) else []
        return list(dict.fromkeys([*named, (64, 64), (224, 224)]))

    def images(self, *leading):
        channels = find(self.config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
        channels = channels if isinstance(channels, int) and channels <= 16 else 3
        return [self.randn(ROWS, *leading, channels, *size) for size in self.image_sizes()]

    def pixel_values(self):
        if {"image_grid_thw", "grid_thw"} & set(self.parameters):
            flat, (channels, patch) = self.patches(), self.patch_shape()
            squares = self.randn(ROWS * 16, channels, patch, patch)
            return [flat, squares, self.randn(ROWS * 16, 2 * channels * patch * patch)]
        frames = find(self.config, "num_frames", "frames_per_clip", default=2)
        videos = self.images(frames)[:1]
        if "Video" in self.auto_name:
            return [*videos, *self.images()]
        return [*self.images(), *self.images(1)[:1], *videos]

    def patches(self):
        """Return the flat patches of two images of four by four patches, as Qwen2-VL takes them."""
        time, (channels, patch) = find(self.config, "temporal_patch_size", default=1), self.patch_shape()
        return self.randn(ROWS * 16, channels * time * patch * patch)

    def patch_shape(self):
        """Return the channels and the side of a patch."""
        patch = find(self.config, "patch_size", default=14)
        channels = find(self.config, "in_channels", "in_chans", "num_channels", default=3)
        return channels, patch if isinstance(patch, int) else 14

    def states(self):
        if "grid_thw" in self.parameters:  # what a vision tower calls its patches
            return [self.patches()]
        return [self.randn(ROWS, LENGTH, find(self.config, "hidden_size", "d_model", default=64))]

    def features(self):
        bins = find(self.config, "num_mel_bins", "feature_size", "n_mels", "input_dim", "mel_bins", default=80)
        bins = find(self.config, "input_feat_per_channel", default=bins)
        frames = 2 * find(self.config, "max_source_positions", default=FRAMES // 2)
        shapes = [(ROWS, bins, frames), (ROWS, FRAMES, bins), (ROWS, bins, FRAMES), (ROWS, 1, FRAMES, bins)]
        return [self.randn(*shape) for shape in dict.fromkeys(shapes)]

    def feature_masks(self):
        """Return masks for the lengths that `features` have; all frames are there."""
        lengths = (2 * find(self.config, "max_source_positions", default=FRAMES // 2), FRAMES)
        return [torch.ones(ROWS, length, dtype=torch.long) for length in dict.fromkeys(lengths)]

    def sounds(self):
        spectrogram = (
            ROWS,
            find(self.config, "max_length", default=FRAMES),
            find(self.config, "num_mel_bins", default=0),
        )
        shapes = [(ROWS, SAMPLES), (ROWS, 1, SAMPLES), (ROWS, SAMPLES, 1)]
        shapes = [spectrogram, *shapes] if spectrogram[-1] else shapes
        return [self.randn(*shape) for shape in shapes]

    def boxes(self):
        corners = torch.tensor([1, 2, 9, 10]).expand(ROWS, LENGTH, 4)
        return [corners, corners / 20]

    def past_values(self):
        length = find(self.config, "context_length", "prediction_length", default=32)
        lags = find(self.config, "lags_sequence", default=[0])
        channels = find(self.config, "num_input_channels", "input_size", default=1)
        shapes = [(ROWS, length + max(lags)), (ROWS, length, channels)]
        return [self.randn(*shape).abs() for shape in (shapes if find(self.config, "lags_sequence") else shapes[::-1])]

    def future_values(self):
        length = find(self.config, "prediction_length", default=32)
        return [self.randn(ROWS, length), self.randn(ROWS, length, find(self.config, "num_input_channels", default=1))]

    def time_features(self, names):
        count = find(self.config, "num_time_features", default=0) + find(
            self.config, "num_dynamic_real_features", default=0
        )
        length = find(self.config, *names, default=32)
        lags = max(find(self.config, "lags_sequence", default=[0])) if names[0] == "context_length" else 0
        return [self.randn(ROWS, length + lags, count)]


MAKERS = {
    "input_ids": lambda make: [make.ids(LENGTH)],
    "decoder_input_ids": lambda make: [make.ids(TARGET_LENGTH)],
    "attention_mask": lambda make: [torch.ones(ROWS, LENGTH, dtype=torch.long)],
    "pixel_values": Inputs.pixel_values,
    "pixel_values_videos": lambda make: make.images(find(make.config, "num_frames", "frames_per_clip", default=2)),
    "image_grid_thw": lambda make: [torch.tensor([[1, 4, 4]] * ROWS)],
    "grid_thw": lambda make: [torch.tensor([[1, 4, 4]] * ROWS)],
    "query_embeds": lambda make: [make.randn(ROWS, 8, find(make.config, "hidden_size", default=64))],
    "input_features": Inputs.features,
    "audio_values": Inputs.sounds,
    "input_values": Inputs.sounds,
    "input_points": lambda make: [torch.full((ROWS, 1, 1, 2), 5.0)],
    "bbox": Inputs.boxes,
    "past_values": Inputs.past_values,
    "future_values": Inputs.future_values,
    "past_time_features": lambda make: make.time_features(("context_length",)),
    "future_time_features": lambda make: make.time_features(("prediction_length",)),
    "past_observed_mask": lambda make: [torch.ones_like(make.past_values()[0])],
    "states": lambda make: [make.randn(ROWS, LENGTH, find(make.config, "state_dim", default=16))],
    "actions": lambda make: [make.randn(ROWS, LENGTH, find(make.config, "act_dim", default=16))],
    "rewards": lambda make: [make.randn(ROWS, LENGTH, 1)],
    "returns_to_go": lambda make: [make.randn(ROWS, LENGTH, 1)],
    "timesteps": lambda make: [torch.arange(LENGTH).expand(ROWS, LENGTH)],
    "hidden_states": Inputs.states,
    "inputs_embeds": lambda make: [make.randn(ROWS, LENGTH, find(make.config, "hidden_size", "d_model", default=64))],
    "encoder_hidden_states": lambda make: [make.randn(ROWS, LENGTH, find(make.config, "hidden_size", default=64))],
    "audio_codes": lambda make: [torch.randint(16, (ROWS, find(make.config, "num_codebooks", default=8), LENGTH))],
    "spectrogram": Inputs.features,
    "qformer_input_ids": lambda make: [make.ids(LENGTH)],
    "task_inputs": lambda make: [make.ids(find(make.config, "task_seq_len", default=LENGTH))],
    "input_features_mask": Inputs.feature_masks,
    "feature_attention_mask": Inputs.feature_masks,
    "merge_sizes": lambda make: [torch.tensor([2] * ROWS)],
    "audio_mel": lambda make: [make.randn(ROWS, FRAMES, find(make.config, "input_feat_size", default=128))],
    "audio_mel_mask": lambda make: [torch.zeros(ROWS, FRAMES, dtype=torch.bool)],
    "latents": lambda make: [make.randn(ROWS, find(make.config, "hidden_size", default=64), 8)],
}
# Given where they are taken; the others only where they have to be.
NEVER = {"attention_mask", "inputs_embeds", "hidden_states", "pixel_values_videos"}
USUAL = {"input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids", "image_grid_thw", "bbox"}


def with_placeholders(batch, token, count, parameters):
    """Return the batch with ``count`` places for its image before the text of each row.

    Args:
        batch: With ``input_ids``.
        token: That marks a place.
        count: Of places.
        parameters: Names that ``forward`` takes.
    """
    text = batch["input_ids"]
    places = torch.full((len(text), count), token)
    batch = batch | {"input_ids": torch.cat([places, text], dim=1)}
    if "labels" in batch and batch["labels"].shape == text.shape:
        batch["labels"] = torch.cat([torch.full_like(places, -100), text], dim=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in parameters:
            batch[name] = (batch["input_ids"] == token).long()
    return batch


def counts_of_places(error, hidden_size):
    """Return how many places a row may lack, from the error that says how many features have none."""
    found = re.findall(r"features:? \(?(?:torch\.Size\(\[)?(\d+)", str(error))
    numbers = [int(number) for number in found]
    counts = [number // divisor for number in numbers for divisor in (ROWS, ROWS * hidden_size, 1)]
    return [count for count in dict.fromkeys(counts) if 0 < count <= 1024]
