"""Keeps bench/results and the README's table: the latest rows per device, with provenance.

python bench/table.py save run.json ...        into bench/results/<device>.json; rows not measured again stay
python bench/table.py readme README.md bench/results/NAME.json    between <!-- bench:cpu --> and <!-- /bench -->
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

from nlora_kernels import benchmarks  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("save")
    saving.add_argument("runs", nargs="+", type=Path)
    saving.add_argument("--out", type=Path, default=ROOT / "results")
    readme = commands.add_parser("readme")
    readme.add_argument("text", type=Path)
    readme.add_argument("results", nargs="+", type=Path)
    readme.add_argument("--marker", default="bench:cpu")
    args = parser.parse_args()
    if args.command == "save":
        for run in args.runs:
            print(benchmarks.save(benchmarks.load(run), args.out))
        return
    table = "\n".join(benchmarks.markdown(benchmarks.load(path)) for path in args.results)
    args.text.write_text(benchmarks.insert(args.text.read_text(), table, args.marker))


if __name__ == "__main__":
    main()
