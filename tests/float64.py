"""train.py in double precision: what differs between two runs then is not rounding."""

import sys

import torch

torch.set_default_dtype(torch.float64)

import train  # noqa: E402 - the default has to be there before anything is built
from finetune.config import load_config  # noqa: E402

if __name__ == "__main__":
    arguments = train.parse_arguments()
    sys.exit(train.main(load_config(arguments.config, arguments.overrides)))
