# SPDX-License-Identifier: Apache-2.0
"""
python recipes/update_catalog.py --model_name_or_path outputs/quickstart/msl \
    --add new_items.csv --withdraw 17 204 --output_dir outputs/updated
"""

from trl_msl.scripts.update_catalog import run


if __name__ == "__main__":
    run()
