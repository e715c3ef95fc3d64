# SPDX-License-Identifier: Apache-2.0
"""
python recipes/merge_adapter.py --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
"""

from trl_msl.scripts.merge import run


if __name__ == "__main__":
    run()
