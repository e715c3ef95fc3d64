# SPDX-License-Identifier: Apache-2.0
"""`python -m trl_msl.doctor`."""

import sys

from trl import TrlParser

from ..data import DataArguments
from .diagnose import DoctorArguments, main


sys.exit(main(*TrlParser((DoctorArguments, DataArguments)).parse_args_and_config()))
