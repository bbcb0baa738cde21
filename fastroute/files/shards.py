"""Shards: the shares of a folder that several processes or machines upscale, without knowing of each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from fastroute.files.jobs import Job

# Variables of the environment that name a process and the number of processes: of Slurm's arrays, whose tasks are numbered from
# any number on, and of torchrun.
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
RANKS = ("RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Shard:
    """Share `number` of `count`, counted from 1."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"shard: the number must be from 1 to the number of shards; got {self.number}/{self.count}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `text` names, such as "3/16".

        Raises:
            ValueError: `text` names none.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise ValueError(f"shard: it must be a number and how many there are, such as 3/16; got {text!r}")
        return cls(int(number), int(count))

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] | None = None) -> Shard:
        """The shard of this task of a Slurm array, or of this process of torchrun.

        Raises:
            ValueError: the environment names none.
        """
        given = os.environ if variables is None else variables
        for names in (ARRAY, RANKS):
            values = [given.get(name, "") for name in names]
            if all(value.isdecimal() for value in values):
                numbers = [int(value) for value in values]
                # Tasks of an array may begin anywhere, ranks begin at 0.
                first = numbers[1] if names is ARRAY else 0
                return cls(numbers[0] - first + 1, numbers[-1])
        raise ValueError(f"shard: neither {' and '.join(ARRAY)} nor {' and '.join(RANKS)} are set; name a shard, such as 3/16")

    def share(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of this shard, in their order. Every job belongs to one shard, and shards have about as many pixels each.

        It depends on the jobs alone, so all processes that see the same files agree. Results that exist make no difference.
        """
        sizes = [pixels_of(job) for job in jobs]
        loads, mine = [0] * self.count, set()
        # The largest first, each to the shard that has least so far.
        for n in sorted(range(len(jobs)), key=lambda n: (-sizes[n], str(jobs[n].source))):
            least = min(range(self.count), key=loads.__getitem__)
            # Files without a known size count too.
            loads[least] += max(sizes[n], 1)
            if least == self.number - 1:
                mine.add(n)
        return [job for n, job in enumerate(jobs) if n in mine]


def pixels_of(job: Job) -> int:
    """The number of pixels that the header of a job's source states; its number of bytes if it cannot be read so."""
    try:
        with Image.open(job.source) as image:
            return image.width * image.height
    except Exception:  # a damaged file may raise anything; it is reported by the shard that reads it
        try:
            return job.source.stat().st_size
        except OSError:
            return 0
