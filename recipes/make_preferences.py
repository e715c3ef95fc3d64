# SPDX-License-Identifier: Apache-2.0
"""accelerate launch recipes/make_preferences.py --model_name_or_path outputs/quickstart/msl --negatives model"""

from trl_msl.scripts.preferences import run


if __name__ == "__main__":
    run()
