# SPDX-License-Identifier: Apache-2.0
"""
Run a script with FSDP2 on CPU processes: `accelerate launch --config_file fsdp2.yaml tests/fsdp_on_cpu.py script.py`.

accelerate takes up FSDP where it finds several GPUs. PyTorch's `fully_shard` runs on CPUs as well, so telling
accelerate that these are GPUs is all that it takes.
"""

import runpy
import sys

from accelerate import DistributedType, PartialState


original_init = PartialState.__init__


def init(self, *args, **kwargs):
    original_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
