"""Which class stands for a model type: one with the head that is trained most often, through its Auto class."""

import transformers
from transformers.models.auto import auto_factory
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

# In this order; a type that has one of the second classes is not known for its decoder alone.
FIRST = (
    "AutoModelForImageTextToText",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModelForVideoClassification",
    "AutoModelForMaskedLM",
    "AutoModelForObjectDetection",
    "AutoModelForSemanticSegmentation",
)
NOT_DECODERS = {"AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"}
LAST = ("AutoModel", "AutoBackbone", "AutoModelForPreTraining")


def model_types():
    """Return the names of all types, in alphabetical order."""
    return sorted(CONFIG_MAPPING_NAMES)


def config_class_of(model_type):
    return CONFIG_MAPPING[model_type]


def classes_of(model_type):
    """Return pairs of Auto class and model class that a type has, the one to take first."""
    config_class = config_class_of(model_type)
    found = {}
    for auto in _auto_classes():
        model_class = _model_class(auto, config_class)
        if model_class is not None:
            found.setdefault(model_class, auto)
    pairs = [(auto, model_class) for model_class, auto in found.items()]
    if any(auto.__name__ in NOT_DECODERS for auto in found.values()):
        pairs.sort(key=lambda pair: pair[0].__name__ == "AutoModelForCausalLM")
    return pairs


def _model_class(auto, config_class):
    if config_class not in auto._model_mapping:
        return None
    try:
        found = auto._model_mapping[config_class]
    except ValueError:  # it names a class that transformers lacks
        return None
    return found[0] if isinstance(found, (list, tuple)) else found


def config_for(model_class, auto, config):
    """Return the config that an Auto class gives a model: of a part, if the model is that part alone (Llama 4)."""
    if isinstance(config, model_class.config_class):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
    return next((part for part in parts if type(part) in auto._model_mapping), config)


def _auto_classes():
    every = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")]
    every.append(transformers.AutoBackbone)
    every = [auto for auto in every if issubclass(auto, auto_factory._BaseAutoModelClass)]
    every = [auto for auto in every if auto._model_mapping is not None]  # its length would import all models
    names = {auto.__name__: auto for auto in every}
    between = [name for name in names if name not in FIRST + LAST]
    return [names[name] for name in (*FIRST, *between, *LAST) if name in names]
