"""What a process of `test_mid_run.py` runs: `python -m tests.support.mid_run_worker FIRST FOLDER`."""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.support.compressed_models import logits_of
from tests.test_callbacks import calibration_batches, full_size, trained


def main(first, folder):
    rank = int(os.environ["RANK"])
    options = {"per_device_train_batch_size": 1, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 8}
    trainer = trained(full_size(first), folder, callback={"batches": calibration_batches()[rank::2]}, **options)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert trainer.model_wrapped.module is trainer.model
    save_file({"logits": logits_of(trainer.model.eval())}, Path(folder) / f"{rank}.safetensors")
    distributed.barrier()  # one that ends while the other is at work may abort
    os._exit(0)  # a thread of Gloo that is still there when Python shuts down may abort the process


if __name__ == "__main__":
    main(*sys.argv[1:])
