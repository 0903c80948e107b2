"""Accelerate's config file, for a process that no launcher started: device, precision and compilation are read from it.

`accelerate launch` hands them to its processes as environment variables, which the Accelerator reads. Here they are set
from the same file by the same code, so that `python train.py`, which a supervisor's signals reach, trains as launched.
"""

import os

import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from finetune.core.errors import first_line
from finetune.core.launcher import launch_error

VARIABLE = "ACCELERATE_CONFIG_FILE"
_LAUNCHED = "ACCELERATE_DYNAMO_MODE"  # set by accelerate launch in every process
_THREADS = ("OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME")  # torch has read them already
_WORDS = "mixed_precision", "distributed_type", "dynamo_backend"
_NUMBERS = "num_processes", "num_machines"
_SHARDING = {"use_fsdp": "FSDP", "use_deepspeed": "DEEPSPEED", "use_megatron_lm": "MEGATRON_LM"}


def take_launch_config() -> None:
    """Set Accelerate's environment variables from its config file, unless `accelerate launch` has set them.

    The file is the one that ACCELERATE_CONFIG_FILE names, or else, for a process on its own, the one that `accelerate
    config` wrote, if any. Variables that are set already count. If the file asks for more processes, that is printed.

    Raises:
        UserError: if the file cannot be used, or if accelerate launch ignored the one that was named.
    """
    named = os.environ.get(VARIABLE)
    if _LAUNCHED in os.environ:
        if named is not None:
            raise launch_error(
                f"{VARIABLE}: found {named}, which accelerate launch does not read; name the file with accelerate "
                f"launch --config_file, and unset {VARIABLE}"
            )
        return
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    file = named or (default_config_file if alone and os.path.isfile(default_config_file) else None)
    if file is None:
        return
    try:
        _check_values(file)
        words = ["--config_file", file, "--num_processes", "1", "--num_machines", "1", "train.py"]
        arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        _, variables = prepare_simple_launcher_cmd_env(arguments)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise launch_error(
            f"launch: {file}: cannot be used ({first_line(error)}); expected a config file of Accelerate, as "
            f"accelerate config writes one; {VARIABLE} names another"
        ) from error
    variables |= {f"ACCELERATE_USE_{name}": "true" for flag, name in _SHARDING.items() if getattr(arguments, flag)}
    for name, value in variables.items():
        if name not in _THREADS:
            os.environ.setdefault(name, value)
    asked = getattr(config, "num_processes", None) or 1
    if alone and asked > 1:
        print(f"launch: {file} sets num_processes: {asked}, but this is 1 process; accelerate launch starts {asked}.")


def _check_values(file: str) -> None:
    """Raises ValueError for values that Accelerate would take, or stumble over, without saying which."""
    with open(file, encoding="utf-8") as content:
        values = yaml.safe_load(content)  # JSON is YAML too
    if not isinstance(values, dict):
        raise ValueError("it holds no mapping")
    for key, value in values.items():
        if key in _WORDS and isinstance(value, bool):
            raise ValueError(f"{key} is {str(value).lower()}, as YAML reads the word no without quotes: write 'no'")
        if key in _NUMBERS and not (value is None or type(value) is int):
            raise ValueError(f"{key} is {value!r}, not a whole number")
