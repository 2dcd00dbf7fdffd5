"""The commands that README and docs show, and how each is tried here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROGRAMS = ("fastokd", "make", "pip", "python", "torchrun")
# A word that stands for the reader's own: the command's options are looked up, and it isn't run.
PLACEHOLDER = re.compile(r"\b(RECIPE|DIR|RUN|NAME|FILE|C|N)\b|\.\.\.|\|")
ENVIRONMENT = re.compile(r"^[A-Z_]+=")

# Tried as far as their options: what they take, or what they need, is more than a test has.
NOT_RUN = {
    "fastokd bench": "every claim in turn with its loop: minutes on a quiet machine",
    "fastokd bench --only okddip_branch": "a claim at its own size: a minute on a quiet machine",
    "fastokd bench --steps 8": "every claim: minutes on a quiet machine",
    "fastokd bench --gpu-report report.json": "minutes; tests/proofs/test_gpu_first.py runs it",
    "fastokd watch runs": "a server, which ends with ^C; tests/overview/test_watch.py runs it",
}
# On these pages ResNet-8 stands for the deeper CIFAR networks, which are the same code.
SMALLER = ("README.md", "docs/compare.md", "docs/translation.md")
DEEP = re.compile(r"resnet(14|20|32|56|110)(_basic)?(?![\d_])|densenet_40_12")
# They take the networks that the page names.
AS_NAMED = ("reproduce", "list", "model-info", "plan", "bench")
# Run from first to last by another test, with what they need.
ELSEWHERE = {
    "docs/your-data.md": "tests/test_own.py",
    "docs/your-method.md": "tests/test_own.py",
    "docs/reproduce.md": "tests/reproduce/test_all.py",
}


class Command(NamedTuple):
    """One command: its page, its words, and whether it is whole (or only named in a sentence)."""

    page: str
    words: tuple[str, ...]
    whole: bool

    @property
    def text(self) -> str:
        return " ".join(self.words)


def pages() -> list[str]:
    """README and every page of the site, from the repository's root."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found]


def commands(page: str) -> list[Command]:
    """A page's commands, each once: of fenced and indented blocks, and those within sentences."""
    text = (ROOT / page).read_text()
    fences = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks = [*fences, *re.findall(r"(?:^    .*\n)+", rest, re.MULTILINE)]
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    shown = [_words(line) for line in lines if _is_command(line)]
    # A backslash in a table keeps its bar from ending the cell.
    spans = [s.replace("\\|", "|") for s in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", rest)]
    named = [_words(span) for span in spans if _is_command(span)]
    found = [Command(page, words, _whole(words)) for words in (*shown, *named)]
    return list(dict.fromkeys(found))


def _is_command(line: str) -> bool:
    words = [w for w in line.removeprefix("$ ").split() if not ENVIRONMENT.match(w)]
    return len(words) > 1 and words[0] in PROGRAMS


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line.strip().removeprefix("$ ").removesuffix(" &"), comments=True)
    return tuple(word for word in words if not ENVIRONMENT.match(word))


def _whole(words: tuple[str, ...]) -> bool:
    """Whether nothing stands for the reader's own, and a command that needs more has it."""
    return not PLACEHOLDER.search(" ".join(words)) and (len(words) > 2 or words[1] == "doctor")


def subcommand(words: tuple[str, ...]) -> tuple[str, ...]:
    """``("bench", "step")`` of a ``fastokd`` command."""
    return words[1:3] if words[1:3] == ("bench", "step") else words[1:2]


def is_slow(words: tuple[str, ...]) -> bool:
    """Seconds each: images of ImageNet's networks, a traced step, a timed one."""
    return words[1] in ("plan", "bench") or any("imagenet" in w or "flowers" in w for w in words)


def small(words: tuple[str, ...], *, smaller: bool = False) -> list[str]:
    """A ``fastokd`` command's arguments with a step or two of few images in place of its own.

    ``smaller``: the network is a ResNet-8.
    """
    taken = [word.replace("/data/", "") for word in words[1:] if word != "--download"]
    verb = taken[0]
    if smaller and verb not in AS_NAMED:
        taken = [DEEP.sub("resnet8", word) for word in taken]
    if "--parallel" in taken:  # in one process there are no others to share with
        at = taken.index("--parallel")
        del taken[at : at + 2]
    if "--val" in taken:
        taken[taken.index("--val") + 1] = "20"
    if verb == "train":
        taken += [
            "--max-steps",
            "2" if "--resume" in taken else "1",
            *([] if taken[1] == "--resume" else ["--batch-size", "4"]),  # a resumed run has its own
            "--engine",
            "loop",
            "--device",
            "cpu",
        ]
        if any("image_size=224" in word for word in taken):
            sizes = {"image_size=224": "image_size=64", "eval_resize=256": "eval_resize=73"}
            taken = [sizes.get(word, word) for word in taken]
        elif "/imagenet" in taken[1] and "--image-size" not in taken:
            taken += ["--image-size", "64", "--set", "eval_resize=73"]
        taken.append("--quiet")
    if verb in ("plan", "train"):
        taken[1] = taken[1].replace("resnet34", "resnet18")
    if verb == "compare":
        taken = [{"0,0.2,0.4": "0,0.2", "0.01,0.1,1": "0.1,1"}.get(word, word) for word in taken]
        taken += [] if "--dry-run" in taken else ["--dry-run"]
    if taken[:2] == ["bench", "step"]:
        taken += ["--batch-size", "4", "--steps", "1", "--device", "cpu", "--precision", "fp32"]
        taken += [] if "--reference" in taken else ["--engine", "loop"]
    return taken
