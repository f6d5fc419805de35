"""Language: texts about a scene (captions, questions, stories) and their hand-written readers.

    scene --caption--> text --read_caption--> Description, or None if the text is not a caption
    scene --question--> question, answer
    scene --story--> sentences, of which the first few serve as a prompt

All readers accept the grammar of this file alone. Captions name objects in reading order, because
with a random order a model mixes up their attributes.

Run: python -m scenes.language   (CPU, 1 s)
"""
import dataclasses
import functools
import itertools
import re

import numpy as np

from scenes.pictures import (BACKGROUNDS, COLORS, COUNTS, INVERSE, SHAPES, SIZES, Object, Scene,
                             is_relation, main_relation, pick, sample_scene)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption states."""
    objects: tuple[tuple[str, str, str], ...]             # (size, color, shape)
    relations: tuple[tuple[int, str, int], ...]           # (i, "left of", j)
    background: str


def one_of(words) -> str:
    """A regular expression that matches any of the words."""
    return "(?:" + "|".join(words) + ")"


def with_article(words) -> str:
    """("large", "red", "circle") -> "a large red circle"."""
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)

# ---- Captions ----------------------------------------------------------------------------------

# The same wordings write and read captions. a, b and c are the objects in reading order, ab is the
# relation of a to b, and ba_suffix states that of b to a after both: "a with b to its right".
SUFFIX = {"left of": "to its left", "right of": "to its right",
          "above": "above it", "below": "below it"}
WORDINGS = {
    1: ("{a} on a {bg} background",
        "on a {bg} background, {a}",
        "there is {a}. the background is {bg}."),
    2: ("{a} {ab} {b} on a {bg} background",
        "on a {bg} background, {a} {ab} {b}",
        "{a} is {ab} {b}. the background is {bg}.",
        "{a} with {b} {ba_suffix}, on a {bg} background",
        "{ba} {a} is {b}. the background is {bg}."),
    3: ("{a} {ab} {b}, which is {bc} {c}, on a {bg} background",
        "on a {bg} background, {a} {ab} {b}, which is {bc} {c}",
        "{a} is {ab} {b}, which is {bc} {c}. the background is {bg}.",
        "{a} with {b} {ba_suffix} and {c} {cb} that, on a {bg} background",
        "{ba} {a} is {b}. {cb} that is {c}. the background is {bg}."),
}

# Patterns: a regular expression for each wording, its groups named as in WORDINGS.
PARTS = dict.fromkeys(("a", "b", "c"), f"a {one_of(SIZES)} {one_of(COLORS)} {one_of(SHAPES)}")
PARTS |= dict.fromkeys(("ab", "ba", "bc", "cb"), one_of(INVERSE))
PARTS |= {"ba_suffix": one_of(SUFFIX.values()), "bg": one_of(BACKGROUNDS)}
GROUPS = {name: f"(?P<{name}>{part})" for name, part in PARTS.items()}
CAPTIONS = [re.compile(wording.replace(".", r"\.").format(**GROUPS))
            for wordings in WORDINGS.values() for wording in wordings]


def caption(scene: Scene, rng: np.random.Generator, wording: int | None = None) -> str:
    """Describe a scene in full, in the given wording (modulo their number) or in a random one."""
    words = {name: with_article(o.attributes) for name, o in zip("abc", scene.objects)}
    for p, q, first, second in zip("ab", "bc", scene.objects, scene.objects[1:]):
        words[p + q] = main_relation(first, second)
        words[q + p] = main_relation(second, first)
        words[q + p + "_suffix"] = SUFFIX[words[q + p]]
    wordings = WORDINGS[len(scene.objects)]
    chosen = pick(rng, wordings) if wording is None else wordings[wording % len(wordings)]
    return chosen.format(bg=scene.background, **words)


def read_caption(text: str) -> Description | None:
    """What a caption states, or None if it is not in the grammar. Objects may have any order."""
    found = [match for pattern in CAPTIONS if (match := pattern.fullmatch(text))]
    if not found:
        return None
    words = found[0].groupdict()
    if "ba_suffix" in words:
        words["ba"] = next(rel for rel, suffix in SUFFIX.items() if suffix == words["ba_suffix"])
    return Description(
        objects=tuple(tuple(words[name].split()[1:]) for name in "abc" if name in words),
        relations=tuple(("abc".index(p), words[p + q], "abc".index(q))
                        for p, q in ("ab", "ba", "bc", "cb") if p + q in words),
        background=words["bg"])

# ---- Judging -----------------------------------------------------------------------------------

def matches(scene: Scene | None, description: Description) -> dict[str, bool]:
    """Compare a picture, as read (None: refused), with a caption.

    count, color, shape and size compare the objects as multisets. relation asks for all stated
    relations of the best assignment, scene for everything that is_exact compares."""
    scene = scene or Scene("", ())                        # matches nothing
    described, drawn = description.objects, [o.attributes for o in scene.objects]
    same = {"count": len(drawn) == len(described)}
    for k, name in ((1, "color"), (2, "shape"), (0, "size")):
        same[name] = sorted(d[k] for d in drawn) == sorted(d[k] for d in described)
    same["relation"] = same["count"] and best_assignment(description, scene)[1]
    same["background"] = scene.background == description.background
    same["scene"] = is_exact(description, scene)
    return same


def best_assignment(description: Description, scene: Scene) -> tuple[int, bool]:
    """Assign described to drawn objects -> number of equal attributes; are all relations true?"""
    def quality(objects):
        pairs = zip(objects, description.objects)
        agree = sum(o.attributes[k] == d[k] for o, d in pairs for k in range(3))
        return agree, all(is_relation(objects[i], rel, objects[j])
                          for i, rel, j in description.relations)
    choices = itertools.permutations(scene.objects, len(description.objects))
    return max(map(quality, choices), default=(0, False))


def is_exact(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read (None: it does not parse) describes all of a scene rightly."""
    return is_true(description, scene) and len(description.objects) == len(scene.objects)


def is_true(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read states no false fact; it may leave objects out."""
    if description is None or description.background != scene.background:
        return False
    return best_assignment(description, scene) == (3 * len(description.objects), True)

# ---- Questions ---------------------------------------------------------------------------------

PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in (*SHAPES, "object")}
ADJECTIVES = f"(?:{one_of(SIZES)} )?(?:{one_of(COLORS)} )?"               # patterns of questions
THE = f"the ({ADJECTIVES}{one_of((*SHAPES, 'object'))})"               # one group: the phrase
RELATION = f"({one_of(INVERSE)})"

ASK_BACKGROUND = "what color is the background?"
ASK_COUNT = re.compile(rf"how many ({ADJECTIVES})({one_of(PLURAL.values())}) are there\?")
ASK_ATTRIBUTE = re.compile(rf"what (color|shape) is {THE}\?")
ASK_OBJECT = re.compile(rf"what is {RELATION} {THE}\?")
ASK_RELATION = re.compile(rf"is {THE} {RELATION} {THE}\?")


def question_kind(asked: str) -> str:
    """The first two words of a question, such as "how many", or "background"."""
    return "background" if asked == ASK_BACKGROUND else " ".join(asked.split()[:2])


def named(scene: Scene, phrase: str) -> list[Object]:
    """The objects of which a phrase such as "large circle" or "red object" is true."""
    words = set(phrase.split()) - {"object"}
    return [o for o in scene.objects if words <= set(o.attributes)]


@functools.lru_cache(maxsize=256)             # a story asks for the same ones again and again
def unique_phrases(scene: Scene, o: Object) -> tuple[str, ...]:
    """Every phrase that is true of this object and of no other one in the scene."""
    size, color, shape = o.attributes
    choices = itertools.product(("", size + " "), ("", color + " "), (shape, "object"))
    return tuple(phrase for phrase in map("".join, choices) if len(named(scene, phrase)) == 1)


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask about a scene -> (question, its only answer). Each kind is tried first equally often."""
    for kind in rng.permutation(["color", "shape", "count", "relation"]):
        if asked := ask(kind, scene, pick(rng, scene.objects), rng):
            (answer,) = answers(scene, asked)
            return asked, answer


def ask(kind: str, scene: Scene, o: Object, rng: np.random.Generator) -> str | None:
    """A question of a kind about an object, or None if it cannot be asked (a count always can)."""
    if kind == "count":
        things = pick(rng, ["objects", "objects", f"{o.color} objects", f"{o.size} objects",
                            PLURAL[o.shape]])
        return f"how many {things} are there?"
    if kind == "color" and rng.random() < 0.2:
        return ASK_BACKGROUND
    phrases = unique_phrases(scene, o)
    if kind in ("color", "shape"):
        hiding = [p for p in phrases if getattr(o, kind) not in p.split()]      # the answer
        return f"what {kind} is the {pick(rng, hiding)}?" if hiding else None
    others = [q for q in scene.objects if q is not o and unique_phrases(scene, q)]
    if not others:
        return None
    other = pick(rng, others)
    rel, other_phrases = main_relation(o, other), unique_phrases(scene, other)
    is_only = [q for q in scene.objects if is_relation(q, rel, other)] == [o]
    if is_only and rng.random() < 0.5:
        return f"what is {rel} the {pick(rng, other_phrases)}?"
    if not phrases:
        return None
    subject, rel = pick(rng, phrases), pick(rng, [rel, INVERSE[rel]])
    return f"is the {subject} {rel} the {pick(rng, other_phrases)}?"


def answers(scene: Scene, asked: str) -> set[str]:
    """All true answers; none if the question does not parse or "the ..." is not one object."""
    def the(phrase):
        found = named(scene, phrase)
        return found if len(found) == 1 else []

    if asked == ASK_BACKGROUND:
        return {scene.background + "."}
    if m := ASK_COUNT.fullmatch(asked):
        noun = next(s for s, plural in PLURAL.items() if plural == m[2])
        return {("none", *COUNTS)[len(named(scene, m[1] + noun))] + "."}
    if m := ASK_ATTRIBUTE.fullmatch(asked):
        return {getattr(o, m[1]) + "." for o in the(m[2])}
    if m := ASK_OBJECT.fullmatch(asked):
        return {with_article(o.attributes) + "." for other in the(m[2]) for o in scene.objects
                if is_relation(o, m[1], other)}
    if m := ASK_RELATION.fullmatch(asked):
        return {"yes." if is_relation(o, m[2], other) else "no."
                for o in the(m[1]) for other in the(m[3])}
    return set()

# ---- Wrong texts, to be ranked below the right one ----------------------------------------------

def changed(o: Object) -> list[Object]:
    """The objects that differ from o in one attribute."""
    return [dataclasses.replace(o, **{name: value})
            for name, values in (("size", SIZES), ("color", COLORS), ("shape", SHAPES))
            for value in values if value != getattr(o, name)]


def wrong_answers(scene: Scene, asked: str) -> list[str]:
    """The false answers of the kind of the right one; objects differ from it in one attribute."""
    right = answers(scene, asked)
    if asked == ASK_BACKGROUND:
        words = BACKGROUNDS
    elif ASK_COUNT.fullmatch(asked):
        words = "none", *COUNTS
    elif m := ASK_ATTRIBUTE.fullmatch(asked):
        words = COLORS if m[1] == "color" else SHAPES
    elif ASK_OBJECT.fullmatch(asked):
        o = next(o for o in scene.objects if with_article(o.attributes) + "." in right)
        words = [with_article(other.attributes) for other in changed(o)]
    else:
        words = "yes", "no"
    return [word + "." for word in words if word + "." not in right]


def wrong_captions(scene: Scene, rng: np.random.Generator, wording: int, n: int) -> list[str]:
    """n captions in a wording, each of a scene that differs in one attribute of one object or in
    the background."""
    others = [dataclasses.replace(scene, background=background) for background in BACKGROUNDS
              if background != scene.background]
    for i, o in enumerate(scene.objects):
        others += [dataclasses.replace(scene, objects=(*scene.objects[:i], other,
                                                       *scene.objects[i + 1:]))
                   for other in changed(o)]
    return [caption(others[i], rng, wording) for i in rng.permutation(len(others))[:n]]

# ---- Stories -----------------------------------------------------------------------------------

THING = f"{ADJECTIVES}{one_of(SHAPES)}"                       # patterns of sentences
A_THING = f"(?:a(?! o)|an(?= o)) ({THING})"                   # a red ..., an orange ...

SAY_COUNT = ("there is one object", "there are two objects", "there are three objects")
SAY_BACKGROUND = re.compile(f"the background is ({one_of(BACKGROUNDS)})")
SAY_OBJECT = re.compile(f"(?:there|{RELATION} the ({THING})) is {A_THING}")
SAY_RELATION = re.compile(f"the ({THING}) is {RELATION} the ({THING})")
SAY_ATTRIBUTE = re.compile(f"the ({THING}) is ({one_of((*SIZES, *COLORS))})")

VALUES = {"size": set(SIZES), "color": set(COLORS), "shape": set(SHAPES)}
KIND = {word: kind for kind, words in VALUES.items() for word in words}


# What can be wrong with a sentence.
WRONG = ("grammar",                                       # not a form of the grammar
         "no such object", "several such objects",        # its "the .." fits none, or several
         "mentioned before",                              # its "a .." may be one of those before
         "background", "count", "size", "color", "left of", "above",    # it contradicts such a fact
         "relation to itself")


class Facts:
    """What a sequence of sentences states, as the sets of values that are still possible."""
    def __init__(self):
        ranks = set(itertools.permutations(range(3)))     # ranks of the three objects
        self.scene = {"background": set(BACKGROUNDS), "count": {1, 2, 3},
                      "left of": ranks, "above": ranks}
        self.objects = []                     # a dict each, such as VALUES

    def add(self, sentence: str) -> bool:
        """Add a sentence without its period -> whether it is new; ValueError, one of WRONG: nothing
        was added."""
        if m := SAY_BACKGROUND.fullmatch(sentence):
            return self.narrow(self.scene, "background", {m[1]})
        if sentence in SAY_COUNT:
            too_few = set(range(len(self.objects)))
            return self.narrow(self.scene, "count", {SAY_COUNT.index(sentence) + 1} - too_few)
        if m := SAY_OBJECT.fullmatch(sentence):
            other = self.find(m[2]) if m[2] else None     # first: it cannot be the new object
            new = self.introduce(m[3])
            return self.relate(new, m[1], other) if m[2] else True
        if m := SAY_RELATION.fullmatch(sentence):
            return self.relate(self.find(m[1]), m[2], self.find(m[3]))
        if m := SAY_ATTRIBUTE.fullmatch(sentence):
            return self.narrow(self.objects[self.find(m[1])], KIND[m[2]], {m[2]})
        raise ValueError("grammar")

    def narrow(self, facts: dict, key: str, values: set) -> bool:
        """Excludes all other values -> whether this is new. A ValueError leaves the facts alone."""
        before = facts[key]
        if not before & values:
            raise ValueError(key)
        facts[key] = before & values
        return facts[key] != before

    def find(self, phrase: str) -> int:
        """The index of the only object for which all words of a phrase were stated."""
        found = [i for i, known in enumerate(self.objects) if is_stated(phrase, known)]
        if len(found) != 1:
            raise ValueError("no such object" if not found else "several such objects")
        return found[0]

    def introduce(self, phrase: str) -> int:
        """Add an object -> its index. It must differ from all others in a stated attribute."""
        words = phrase.split()
        if any(all(word in known[KIND[word]] for word in words) for known in self.objects):
            raise ValueError("mentioned before")
        if len(self.objects) == max(self.scene["count"]):
            raise ValueError("count")
        self.objects.append(VALUES | {KIND[word]: {word} for word in words})
        return len(self.objects) - 1

    def relate(self, i: int, rel: str, j: int) -> bool:
        """Add that object i is rel of object j -> whether this does not follow from the others."""
        if i == j:
            raise ValueError("relation to itself")
        if rel not in self.scene:
            i, rel, j = j, INVERSE[rel], i
        return self.narrow(self.scene, rel, {r for r in self.scene[rel] if r[i] < r[j]})


def is_stated(phrase: str, known: dict) -> bool:
    """Whether each word of a phrase is the only possible value of an attribute."""
    return all({word} in known.values() for word in phrase.split())


def story(scene: Scene, rng: np.random.Generator) -> str:
    """Three to six sentences about a scene, each with a new fact; stated facts name the objects."""
    facts, sentences = Facts(), []
    mentioned = {}                            # Object -> its entry in facts.objects
    length = int(rng.integers(3, 7))
    kinds = ["exists", "exists", "attribute", "background", "count"]
    if len(scene.objects) > 1:
        kinds += ["next to", "next to", "relation"]
    for kind in rng.permutation(8 * kinds):   # attempts, enough for three sentences
        o = pick(rng, scene.objects)
        sentence = propose(kind, o, scene, mentioned, rng)
        try:
            if sentence and facts.add(sentence):
                sentences.append(sentence + ".")
        except ValueError:                    # the sentence would be ambiguous
            continue
        if len(facts.objects) > len(mentioned):
            mentioned[o] = facts.objects[-1]
        if len(sentences) == length:
            break
    return " ".join(sentences)


def propose(kind: str, o: Object, scene: Scene, mentioned: dict, rng) -> str | None:
    """A sentence of a kind about an object, or None if what was mentioned does not allow one."""
    def phrase(a):
        found = [p for p in unique_phrases(scene, a) if is_stated(p, mentioned.get(a, {}))]
        return pick(rng, found) if found else None

    if kind == "background":
        return f"the background is {scene.background}"
    if kind == "count":
        return SAY_COUNT[len(scene.objects) - 1]
    other = pick(rng, scene.objects) if kind in ("next to", "relation") else None
    subject = phrase(o) if kind in ("attribute", "relation") else "there"
    if other:
        rel, other_phrase = main_relation(o, other), phrase(other)
    if subject is None or (other and other_phrase is None):
        return None
    if kind == "attribute":
        return f"the {subject} is {pick(rng, [o.size, o.color])}"
    if kind == "relation":
        return f"the {subject} is {rel} the {other_phrase}"
    if o in mentioned:
        return None
    words = pick(rng, [o.size, None]), pick(rng, [o.color, o.color, None]), o.shape
    thing = with_article([word for word in words if word])
    return f"{rel} the {other_phrase} is {thing}" if other else f"there is {thing}"


def tell(facts: Facts, text: str) -> list[str]:
    """Adds the sentences of a text to the facts. Returns for each "new", "known" (it follows from
    those before) or what is WRONG with it; a wrong sentence adds nothing."""
    told = []
    for sentence in re.split(r"(?<=\.) ", text.strip()) if text.strip() else []:
        try:
            is_new = facts.add(sentence[:-1] if sentence.endswith(".") else "")
            told.append("new" if is_new else "known")
        except ValueError as error:
            told.append(str(error))
    return told


def is_right(told: list[str]) -> bool:
    """Whether sentences, as `tell` judged them, are all right and at least one is new."""
    return {*told} <= {"new", "known"} and "new" in told


def consistent(prefix: str, continuation: str) -> bool:
    """Whether a continuation parses, states a new fact and contradicts nothing in either text."""
    facts = Facts()
    before, said = tell(facts, prefix), tell(facts, continuation)
    return {*before} <= {"new", "known"} and is_right(said)


def corpus(rng: np.random.Generator, n: int) -> list[str]:
    """n texts of every kind about scenes that are not held out, to train a tokenizer on."""
    texts = []
    while len(texts) < n:
        scene = sample_scene(rng)
        texts += [caption(scene, rng), *question(scene, rng), story(scene, rng)]
    return texts[:n]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    scene = Scene("gray", (Object("circle", "red", "large", 0.4, 0.3),
                           Object("square", "blue", "small", 0.6, 0.75)))
    text = "a large red circle left of a small blue square on a gray background"
    print(f"{text!r} is exact (expect True):", is_exact(read_caption(text), scene))
    print("a question and its answer:", *question(scene, rng))
    print("a story:", text := story(scene, rng))
    print("it continues itself (expect False: nothing is new):", consistent(text, text))
