"""Two versions in one alternating run: ``python -m benchmarks.compare BASE [--head REF]``; fails where the newer is slower.

Each commit is unpacked and built under build/compare/<commit>; without --head the working tree is compared with BASE. Fresh
processes of the two take turns, so that whatever slows the machine slows both. A case has regressed when the median ratio of
its pairs is beyond one by more than LEAST and by more than three standard errors of that median, as the quartiles of their
logarithms tell. Cases that seem to have regressed are run once more before they count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "compare"
CASES = Path(__file__).parent / "compare_cases.py"
ROUNDS = 9
# Below this a difference is the layout of code and memory, whatever the statistics say.
LEAST = 0.03
# Quartiles of a normal distribution lie 1.349 standard deviations apart; its median has 1.2533 times the error of its mean.
SPREAD, MEDIAN_ERROR = 1.349, 1.2533


@dataclass(frozen=True)
class Verdict:
    """One case: seconds of both versions, the median ratio head / base, its noise, and whether that is a regression."""

    base: tuple[float, float, float]
    head: tuple[float, float, float]
    ratio: float
    noise: float

    @property
    def regressed(self) -> bool:
        """Slower beyond the noise."""
        return self.ratio - 1 > self.noise


def three(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def judge(base: list[float], head: list[float]) -> Verdict:
    """Compare the seconds of pairs of runs."""
    # Logarithms: twice as slow and twice as fast are equally far from one.
    low, middle, high = three([math.log(h / b) for b, h in zip(base, head, strict=True)])
    error = MEDIAN_ERROR * (high - low) / SPREAD / math.sqrt(len(base))
    return Verdict(three(base), three(head), math.exp(middle), max(LEAST, math.expm1(3 * error)))


def git(*arguments: str) -> str:
    """The output of a git command; its message ends the program where it fails."""
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout.strip()


def tree_of(reference: str) -> Path:
    """The commit unpacked and built in a folder of its own; what is there from an earlier call is used again."""
    commit = git("rev-parse", "--verify", f"{reference}^{{commit}}")
    tree = WORK / commit[:12]
    done = tree / ".built"
    if done.exists():
        return tree
    tree.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    print(f"Building {reference} ({commit[:12]}) in {tree}: a few minutes.", flush=True)
    build = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, capture_output=True, text=True, check=False
    )
    if build.returncode:
        raise SystemExit(f"cannot build {reference} in {tree}:\n{build.stderr[-2000:]}")
    done.touch()
    return tree


def run_once(tree: Path, smoke: bool) -> dict:
    """All cases in a fresh process with the package of one tree: its backend and seconds or a reason by case."""
    command = [sys.executable, str(CASES), str(tree), *(["--smoke"] if smoke else [])]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tree)}, cwd=WORK, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def check_backends(trees: tuple[Path, Path]) -> None:
    """Both must run on the same backend: an extension may be missing or stale in one of them."""
    backends = [run_once(tree, True)["backend"] for tree in trees]
    if backends[0] != backends[1]:
        raise SystemExit(f"{trees[0]} runs on the backend {backends[0]}, {trees[1]} on {backends[1]}: build both alike")


def alternating(trees: tuple[Path, Path], rounds: int, smoke: bool) -> list[list[dict[str, float | str]]]:
    """Results of both trees in `rounds` pairs of processes; every other pair begins with the second."""
    results: list[list[dict[str, float | str]]] = [[], []]
    for number in tqdm(range(rounds), desc="compare", unit="pair"):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            results[which].append(run_once(trees[which], smoke)["cases"])
    return results


def verdicts(results: list[list[dict[str, float | str]]]) -> tuple[dict[str, Verdict], dict[str, str]]:
    """A verdict per case that both versions run, and why there is none of the others."""
    judged, missing = {}, {}
    for case in results[1][0]:
        values = [[run.get(case, "no such case") for run in runs] for runs in results]
        reason = next((value for runs in values for value in runs if isinstance(value, str)), None)
        if reason is None:
            judged[case] = judge(*values)  # type: ignore[arg-type]
        else:
            missing[case] = reason
    return judged, missing


def show(judged: dict[str, Verdict], missing: dict[str, str]) -> None:
    """One line per case: medians and quartiles in ms, ratio and noise."""
    print(f"{'case':<32}{'base, ms':>32}{'head, ms':>32}{'head / base':>13}{'noise':>9}")
    for case, v in judged.items():
        sides = [f"{1e3 * m:.3f} [{1e3 * a:.3f}, {1e3 * b:.3f}]" for a, m, b in (v.base, v.head)]
        word = "  slower" if v.regressed else "  faster" if 1 / v.ratio - 1 > v.noise else ""
        print(f"{case:<32}{sides[0]:>32}{sides[1]:>32}{v.ratio:>13.3f}{v.noise:>9.1%}{word}")
    for case, reason in missing.items():
        print(f"{case:<32}not compared: {reason}")


def main() -> None:
    """Build, measure, print; end with status 1 on a regression."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit, branch or tag")
    parser.add_argument("--head", help="compare this commit instead of the working tree")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of processes (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="small inputs: does it run?")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, or nothing tells the noise; got {args.rounds}")
    WORK.mkdir(parents=True, exist_ok=True)
    trees = (tree_of(args.base), tree_of(args.head) if args.head else ROOT)
    check_backends(trees)
    results = alternating(trees, args.rounds, args.smoke)
    judged, missing = verdicts(results)
    if any(v.regressed for v in judged.values()):
        print("Some cases seem slower: once more.", flush=True)
        again = alternating(trees, args.rounds, args.smoke)
        judged, missing = verdicts([first + second for first, second in zip(results, again, strict=True)])
    show(judged, missing)
    slower = [case for case, v in judged.items() if v.regressed]
    if not judged:
        raise SystemExit("no case runs in both versions")
    if slower:
        raise SystemExit(f"slower beyond the noise: {', '.join(slower)}")


if __name__ == "__main__":
    main()
