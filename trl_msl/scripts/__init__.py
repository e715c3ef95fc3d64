# SPDX-License-Identifier: Apache-2.0
"""The commands: one module each, run by `trl-msl <command>` or by `accelerate launch -m trl_msl.scripts.<module>`."""
