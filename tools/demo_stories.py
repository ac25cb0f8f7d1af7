"""Short children's stories with a plan, and requests for them, without end.

    python tools/demo_stories.py 30     # print so many

demo_corpus/plots.txt holds hand-written plots: what the hero wants, what goes wrong, who helps and how it ends.
demo_corpus/words.txt holds heroes, names, places, objects, morals, openings and the wordings of requests. A `Plan` is
one choice from all of them; `tell` writes it out as a story and `ask` as a request that names some of what the plan
holds. Everything a request can name is in the story, so a model that learns from the pairs learns to do as asked.

In both files `[this|that]` is a choice, made alike wherever it has the same number, `[1:this|that]`, and `{slot}` is
filled in: one of `Plan.slots`, or an entry of the list of that name, the same one all through a story. `{H}` and `{F}`
are the hero and the friend; the friend's first mention says who it is, as an old friend or, with `{a F}`, as a
stranger. A plot begins with a line of its kind and its event, the others are its beats:

    = finds a lost key                                    (+ object plots and * meetings have no event)
    @ places; heroes; adjectives; themes                  (-list keeps its heroes out, !word an adjective)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import re
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "demo_corpus"
HEROES = ["person", "person", "animal", "animal", "animal", "bird", "bug", "made"]  # drawn evenly from these lists
HE, SHE = ("he", "him", "his", "himself"), ("she", "her", "her", "herself")


@functools.cache
def words() -> dict[str, list[str]]:
    """The lists of words.txt, and the names of names.txt among those for girls and boys."""
    lists: dict[str, list[str]] = {}
    for line in (CORPUS / "words.txt").read_text().splitlines():
        if line.startswith("  "):
            entries = line
        elif line and line[0] != "#":
            key, entries = line.split(":", 1)
            lists[key] = []
        else:
            continue
        lists[key] += [entry.strip() for entry in entries.split(" | ")]
    for key, names in zip(("girls", "boys"), (CORPUS / "names.txt").read_text().splitlines(), strict=True):
        lists[key] += names.split()
    return lists


@dataclasses.dataclass(frozen=True)
class Plot:
    sort: str  # "=" tells an event, "+" what an object is good for, "*" how two meet
    event: str
    places: list[str]  # lists of places; none: anywhere
    heroes: list[str]
    barred: set[str]  # kinds of heroes that do not fit
    adjectives: list[str]  # those that fit best
    unfit: set[str]  # and those that do not
    themes: list[str]
    beats: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.beats)


@functools.cache
def plots() -> list[Plot]:
    """The plots of plots.txt."""
    return [_plot(block.splitlines()) for block in (CORPUS / "plots.txt").read_text().strip().split("\n\n")]


def _plot(lines: list[str]) -> Plot:
    head, *beats = lines
    sort, event = head[0], head[2:]
    if sort == "=":
        fields, *beats = beats
        fields = fields[2:]
    else:
        fields = event
    places, heroes, adjectives, themes = (field.strip() for field in fields.split(";"))
    everyone = sort != "=" or "all" in heroes.split()
    return Plot(
        sort,
        event if sort == "=" else "",
        [] if places == "any" else places.split(),
        HEROES + ["sea", "thing", "thing"] * everyone,
        {kind for word in heroes.split() if word[0] == "-" for kind in words()[word[1:]]},
        [word for word in adjectives.split() if word[0] != "!"],
        {word[1:] for word in adjectives.split() if word[0] == "!"},
        [theme.strip() for theme in themes.split(",") if theme],
        beats,
    )


@dataclasses.dataclass(frozen=True)
class Figure:
    kind: str
    name: str | None
    pronouns: tuple[str, str, str, str]
    adjectives: str

    @property
    def mention(self) -> str:
        return self.name or f"the {self.kind}"

    @property
    def described(self) -> str:
        return f"a {self.adjectives} {self.kind}".replace("  ", " ")


def draw_figure(
    rng: random.Random, groups: list[str], named: float, plot: Plot | None = None, other: Figure | None = None
) -> Figure:
    """Somebody of one of the groups, unlike the other one, who fits the plot."""
    lists = words()
    barred = plot.barred if plot else set()
    while True:
        group = rng.choice(groups)
        kind = rng.choice(lists[group])
        if kind not in barred and not (other and {*kind.split()} & {*other.kind.split()}):
            break
    she = kind in lists["female"] or (kind not in lists["male"] and rng.random() < 0.5)
    names = lists["girls" if she else "boys"] + lists["either"]
    name = rng.choice(names)
    while other and name == other.name:
        name = rng.choice(names)
    unfit = set(lists["not " + ("babies" if kind in lists["babies"] else "elders")]) | (plot.unfit if plot else set())
    if kind not in lists["babies"] + lists["elders"]:
        unfit = plot.unfit if plot else set()
    pool = lists["adjectives"] + lists["colors"] * (group != "person")
    if plot and plot.adjectives and rng.random() < 0.4:
        pool = plot.adjectives
    pool = [word for word in pool if word not in unfit] or ["kind"]
    adjectives = rng.choice(pool) if rng.random() < 0.9 else ""
    if rng.random() < 0.12 and not {"little", "young"} & unfit and adjectives not in lists["sizes"]:
        adjectives += rng.choice((" little", " young", " little"))
    return Figure(kind, name if rng.random() < named else None, SHE if she else HE, adjectives.strip())


@dataclasses.dataclass(frozen=True)
class Plan:
    plot: Plot
    hero: Figure
    friend: Figure
    place: str | None
    at_home: bool  # the hero lives in the place, otherwise the plot happens there
    object: str | None
    trouble: str
    remedy: str
    theme: str | None
    bedtime: bool
    pair: bool  # the friend is there from the first line

    @functools.cached_property
    def slots(self) -> dict[str, str | None]:
        """What can be named; None: the plan has no such thing."""
        hero, friend, place = self.hero, self.friend, self.place
        slots: dict[str, str | None] = {
            "H": hero.mention,
            "H's": f"{hero.mention}'s",
            "Hv": hero.name or f"dear {hero.kind}",
            "F's": f"{friend.mention}'s",
            "Fv": friend.name or f"dear {friend.kind}",
            "name": hero.name,
            "kind": hero.kind,
            "a hero": hero.described,
            "a hero named": hero.name and f"{hero.described} [named|named|called] {hero.name}",
            "friend name": friend.name,
            "friend kind": friend.kind,
            "a friend": friend.described,
            "a friend named": f"{friend.described} named {friend.name}" if friend.name else friend.described,
            "friend": f"{friend.name} the {friend.kind}" if friend.name else f"the {friend.kind}",
            "event": self.plot.event or None,
            "at": f" {place}" if place and not self.at_home else "",
            " place": place and f" {place}",
            "place": place,
            "home": place if self.at_home else None,
            "O": self.object,
            "o": self.object and re.sub(r"^an? ", "the ", self.object),
            "problem": self.trouble,
            "fix": self.remedy,
            "theme": self.theme,
        }
        slots |= dict(zip(HE, hero.pronouns, strict=True))
        return slots | {f"f.{slot}": word for slot, word in zip(HE, friend.pronouns, strict=True)}


def draw_plan(rng: random.Random) -> Plan:
    lists = words()
    sort = rng.choices("=+*", (72, 14, 14))[0]
    plot = rng.choice([plot for plot in plots() if plot.sort == sort])
    hero = draw_figure(rng, plot.heroes, 1.0 if sort == "*" else 0.75, plot)
    same = [group for group in plot.heroes if (hero.kind in lists["person"]) == (group == "person")]
    groups = plot.heroes if sort == "*" or rng.random() < 0.2 else same
    friend = draw_figure(rng, groups, 1.0 if sort == "*" else 0.85 if hero.name else 0.5, None, hero)
    friendly = sort == "=" and "{a F}" not in plot.text
    bedtime, pair = sort == "=" and rng.random() < 0.12, friendly and rng.random() < 0.15
    at_home = sort != "*" and not pair and rng.random() < 0.3
    places = [entry.removeprefix("+") for entry in lists["places"] if entry[0] == "+" or not at_home]
    if plot.places and not at_home:
        places = [entry for entry in places if entry.split()[0] in plot.places]
    place = rng.choice(places).split(" ", 1)[1] if rng.random() < 0.75 else None
    thing = trouble = remedy = ""
    if sort == "+":
        thing, rest = rng.choice(lists["objects"]).split(": ", 1)
        trouble, remedy = rest.split(" / ")
    elif sort == "=" and rng.random() < 0.1:
        thing = rng.choice([entry for entry in lists["objects"] if entry[0] == "*"]).split(":")[0]
    theme = rng.choice(plot.themes) if plot.themes else None
    thing = thing.strip("*")
    return Plan(plot, hero, friend, place, at_home, thing or None, trouble, remedy, theme, bedtime, pair)


def fill(text: str, slots: dict[str, str | None], rng: random.Random, told: dict[str, str]) -> str:
    """Make the choices and fill the slots, in reading order; `told` keeps the choices made so far."""

    def choice(match: re.Match[str]) -> str:
        number, options = match[1], match[2].split("|")
        if number is None:
            return rng.choice(options)
        return options[int(told.setdefault(number, str(rng.randrange(len(options)))))]

    while "[" in text:
        text = re.sub(r"\[(?:(\d):)?([^\[\]]*)\]", choice, text)

    def slot(match: re.Match[str]) -> str:
        key = match[1]
        if key in ("F", "a F", "my F"):
            first = "friend" not in told
            told["friend"] = ""
            if not first:
                return slots["F's"].removesuffix("'s")
            key = "a friend named" if key == "a F" else rng.choice(words()["friend"])
            return fill(slots.get(key, key), slots, rng, told)
        if key in slots:
            return fill(slots[key], slots, rng, told)
        if (lower := key[0].lower() + key[1:]) in slots:
            return slots[lower].capitalize()
        if key.lower() not in told:
            told[key.lower()] = rng.choice(words()[key.lower()])
        return told[key.lower()]

    return re.sub(r"\{([^{}]+)\}", slot, text)


def finish(text: str) -> str:
    """a or an, and a capital letter where a sentence begins."""
    vowel = re.compile(r"(?!uni|use|one\b|eu)[aeiou]|honest|hour", re.IGNORECASE)
    text = re.sub(r"\b([Aa])n? (?=(\w+))", lambda m: m[1] + ("n " if vowel.match(m[2]) else " "), text)
    return re.sub(r'(^|[.!?] "?|\." |\n\n"?)([a-z])', lambda m: m[1] + m[2].upper(), text)


def draw_line(key: str, slots: dict[str, str | None], rng: random.Random) -> str:
    """A line of the list whose slots the plan can fill."""
    lists = words()
    lines = [s for s in lists[key] if all(slots.get(k, "") is not None for k in re.findall(r"\{([^{}]+)\}", s))]
    return rng.choice(lines)


def ask(plan: Plan, rng: random.Random) -> tuple[str, bool]:
    """A request for the plan's story, and whether it names the theme."""
    own = {"=": "pair" if plan.pair else "bedtime" if plan.bedtime else "event", "+": "object", "*": "meet"}
    general = not plan.pair and not plan.bedtime and plan.plot.sort != "*" and rng.random() < 0.35
    line = draw_line("requests" if general else f"{own[plan.plot.sort]} requests", plan.slots, rng)
    return finish(fill(line, plan.slots, rng, {})), "{theme}" in line


def tell(plan: Plan, rng: random.Random, with_moral: bool) -> str:
    """The plan's story."""
    plot, told = plan.plot, {}
    slots = plan.slots | {"a hero named": plan.slots["a hero named"] or plan.slots["a hero"]}
    beats = list(plot.beats)
    if "{a friend}" in plot.text or plan.pair:
        told["friend"] = ""
    if "{a hero}" not in plot.text:
        key = "pair openings" if plan.pair else "home openings" if plan.place and plan.at_home else "openings"
        beats.insert(0, draw_line(key, slots, rng))
    if plan.object and plot.sort == "=":
        beats.append(draw_line("keepsakes", slots, rng))
    if with_moral:
        beats.append(draw_line(plan.theme, slots, rng))
    if plan.bedtime:
        beats.append(draw_line("bedtime", slots, rng))
    paragraphs = rng.random() < 0.75
    text = ""
    for i, beat in enumerate(beats):
        text += "" if not i else "\n\n" if paragraphs and rng.random() < 0.5 else " "
        beat = fill(beat, slots, rng, told)
        text += beat[0].upper() + beat[1:]
    return finish(text)


def extra(story: str, rng: random.Random) -> str:
    """One more wish that the story fulfils."""
    sentences = len(re.findall(r'[.!?]"?(?=\s|$)', story))
    wishes = words()["extras"] + words()["short extras"] * (len(story.split()) < 150)
    wishes += ["Include some dialogue."] * ('"' in story) + ["Write 6-10 sentences."] * (6 <= sentences <= 10)
    wishes += ["Tell it in a few short paragraphs."] * (2 <= story.count("\n\n") <= 5)
    return rng.choice(wishes)


def draw_row(rng: random.Random) -> dict[str, str]:
    """A request and its story, as a row of the corpus."""
    plan = draw_plan(rng)
    request, names_theme = ask(plan, rng)
    story = tell(plan, rng, names_theme or (plan.theme is not None and rng.random() < 0.08))
    if request[-1] in ".?" and rng.random() < 0.25:
        request += " " + extra(story, rng)
    return {"kind": "planned", "user": request, "assistant": story}


def draw_rows(count: int, seed: int | str) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [draw_row(rng) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print planned stories.")
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    for row in draw_rows(args.count, args.seed):
        print(f"> {row['user']}\n{row['assistant']}\n")


if __name__ == "__main__":
    main()
