"""Settings of runs: config.json of trainings and adaptations, and TOML."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from .case import NASTY, Reader, damaged_bytes, damaged_json, write_bytes

# What a TOML file may hold in the place of a value.
NASTY_TOML = {
    "nothing": "",
    "true": "true",
    "inf": "inf",
    "nan": "-nan",
    "hex": "0xffffffffffffffffffff",
    "date": "1979-05-27",
    "time": "1979-05-27T07:32:00.999999-07:00",
    "bad date": "9999-99-99",
    "half a character": '"\\ud800"',
    "far character": '"\\U00110000"',
    "escape": '"\\u001b[31m"',
    "backslashes": '"C:\\new\\users"',
    "literal": "'C:\\new\\users'",
    "lines": '"""a\nb"""',
    "open text": '"abc',
    "open lines": '"""abc',
    "5,000 digits": "9" * 5000,
    "float of 5,000 digits": "1." + "9" * 5000,
    "1e999": "1e999",
    "list": "[1, 'a', [2]]",
    "900 brackets": "[" * 900 + "]" * 900,
    "100,000 brackets": "[" * 100_000 + "]" * 100_000,
    "open brackets": "[" * 100_000,
    "20,000 empty lists": "[" + "[]," * 20_000 + "]",
    "inline": "{a = 1}",
    "inline of dots": "{" + "a." * 5000 + "a = 1}",
    "200,000 letters": '"' + "a" * 200_000 + '"',
    "nul": '"\\u0000"',
}
NASTY_LINES = {
    "dotted key": "a." * 5_000 + "a = 1",
    "dotted table": "[" + "a." * 5_000 + "a]",
    "twice": "steps = 1\nsteps = 2",
    "tables": "[[a]]\n" * 5_000,
    "other table": "[train]",
    "table twice": "[a]\n[a]",
    "quoted key": '"" = 1',
    "bare word": "steps",
    "equals": "= 1",
    "tabs": "\t\t\n",
    "control character": "a = \x01",
    "carriage": "a = 1\rb = 2",
    "half a line": "steps = [",
    "comment": "#" + "x" * 100_000,
    "nul": "\x00",
    "replaced": "a = \ufffd",
    "unknown": "stepz = 3",
}


class Settings(Reader):
    name = "settings"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.training.adaptation.config import AdaptConfig
        from indomain_guidance.training.domain.config import TrainConfig

        super().__init__(folder)
        self.originals = [
            TrainConfig(
                base="mini_world", data=("digits", "shard-{0000..0003}.tar"), sample_prompts=("a", "b")
            ).to_dict(),
            AdaptConfig(generator="mini_world", base="mini_world", prompt="a yellow digit").to_dict(),
        ]
        self.whole = [(".json", json.dumps(values).encode()) for values in self.originals]
        self.whole += [(".toml", b"base = 'mini_world'"), (".toml", b"steps = x"), (".json", b'{"stepz": 1}')]
        keys = ".".join("a" * 20_000)
        toml = {
            "40 KB of dotted keys": f"{keys} = 1",
            "40 KB of a dotted table": f"[{keys}]",
            "many dotted keys": "\n".join(f"{'a.' * 200}k{n} = 1" for n in range(500)),
            "many dotted tables": "\n".join(f"[{'a.' * 200}k{n}]" for n in range(500)),
            "dotted key in one table": "[x]\n" + f"{keys} = 1",
            "inline of 100,000 braces": "a = " + "{a = " * 100_000,
            "list of 100,000 brackets": "a = " + "[" * 100_000 + "]" * 100_000,
            "2,000,000 digits": "steps = " + "9" * 2_000_000,
            "1 MB of one text": 'name = "' + "a" * 1_000_000 + '"',
            "1 MB of empty lists": "data = [" + "[]," * 300_000 + "]",
            "100,000 keys": "".join(f"k{n} = 0\n" for n in range(100_000)),
            "byte order mark": "\ufeffbase = 'mini_world'",
            "windows paths": 'base = "C:\\Users\\new"',
            "nothing": "",
        }
        texts = {
            "1,000,000 empty lists": "[" + "[]," * 999_999 + "[]]",
            "2,000,000 digits": '{"steps":' + "9" * 2_000_000 + "}",
            "1,000,000 brackets": "[" * 1_000_000,
            "100,000 braces": '{"a":' * 100_000 + "1" + "}" * 100_000,
            "100,000 keys": json.dumps({f"k{n}": 0 for n in range(100_000)}),
            "a text": '"x"',
            "a number": "1",
            "key of a megabyte": json.dumps({"k" * 1_000_000: 1}),
            "1e400": '{"base":"mini_world","steps":1e400}',
            "310 digits": '{"base":"mini_world","steps":' + "9" * 310 + "}",
            "negative": '{"base":"mini_world","seed":-1}',
        }
        self.by_hand = {f"toml: {name}": write_bytes(text.encode("utf-8")) for name, text in toml.items()}
        self.by_hand |= {f"json: {name}": write_bytes(text.encode()) for name, text in texts.items()}
        for name, nasty in NASTY.items():
            self.by_hand[f"json: base = {name}"] = write_bytes(f'{{"base": {nasty}, "data": ["x"]}}'.encode())

    def ending(self, name: str, dice: random.Random) -> str:
        return "." + name.partition(":")[0]

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        values = dice.choice(self.originals)
        if dice.random() < 0.75:
            kind, data = damaged_json(values, dice)
            path = self.folder / "hostile.json"
        else:
            kind, data = damaged_toml(values, dice)
            path = self.folder / "hostile.toml"
        path.write_bytes(data)
        return kind, path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.guidance.errors import Problem
        from indomain_guidance.training.adaptation.config import AdaptConfig
        from indomain_guidance.training.command_line.kinds import kind_of
        from indomain_guidance.training.domain.config import TrainConfig
        from indomain_guidance.training.engine.small_files import read_values

        kinds = (TrainConfig, AdaptConfig, None)
        config = (dice.choice(kinds) or kind_of(read_values(path), str(path))).read(path)
        try:
            config.absolute().public_dict()
        except Problem as problem:  # speaks of a setting, whose file is known to whoever gave it
            return [f"{path}: {problem}"[:500]]
        return []


def damaged_toml(values: dict, dice: random.Random) -> tuple[str, bytes]:
    """(what was done, text): values as TOML, with some replaced, lines added, or bytes damaged."""
    lines = {name: f"{name} = {json.dumps(value)}" for name, value in values.items()}
    kinds = []
    for _ in range(dice.choice((1, 1, 2, 4))):
        if dice.random() < 0.6:
            kinds.append(kind := dice.choice(list(NASTY_TOML)))
            name = dice.choice(list(lines))
            lines[name] = f"{name} = {NASTY_TOML[kind]}"
        else:
            kinds.append(kind := dice.choice(list(NASTY_LINES)))
            lines[f"<{dice.random()}>"] = NASTY_LINES[kind]
    texts = list(lines.values())
    if dice.random() < 0.3:
        dice.shuffle(texts)
    data = "\n".join(texts).encode("utf-8")
    if dice.random() < 0.3:
        kind, data = damaged_bytes(data, dice)
        kinds.append(kind)
    return ", ".join(kinds), data
