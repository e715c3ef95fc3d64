# SPDX-License-Identifier: Apache-2.0
"""accelerate launch recipes/fuse.py --model_name_or_path outputs/quickstart/msl --output_dir outputs/fused"""

from trl_msl.scripts.fuse import run


if __name__ == "__main__":
    run()
