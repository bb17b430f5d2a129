"""From which masking rate on a forward is worth its noise, on longer answers and on plain text.

    OMP_NUM_THREADS=1 python benchmarks/length_rates.py --tokens 32 128 --output bench

The contents and the model of ``length.py``, at an eighth and at a half of a run by masks by count
for the likelihood bound; what is measured is in ``gain.py``. Prints tables, and writes
OUTPUT/length_rates.json.
"""

import argparse
import json
from pathlib import Path

from gain import measured, table
from length import CONTENTS, LENGTHS, RUNS, Bench


def main() -> None:
    """Measure each content at each length, at two moments of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contents", nargs="+", default=list(CONTENTS), choices=list(CONTENTS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], choices=list(LENGTHS))
    parser.add_argument("--moments", type=float, nargs="+", default=[1 / 8, 1 / 2])
    parser.add_argument("--batches", type=int, default=24, help="for each t")
    parser.add_argument("--output", type=Path, required=True, help="directory")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for content in given.contents:
        for tokens in given.tokens:
            bench = Bench(content, tokens)
            batches = bench.batches(bench.length.rows, seed=1)
            for moment in given.moments:
                model = bench.train(*RUNS["ELBO"], seed=0, share=moment)
                name = f"{content} {tokens}, {moment:.3g} of the run"
                lines, both = measured(model, batches, bench.tokenizer.mask_id, given.batches)
                found[name] = {"rates": lines, "elbo_decoder": both}
                print(table(name, lines), flush=True)
                file = given.output / "length_rates.json"
                file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
