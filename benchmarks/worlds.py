"""The worlds of the small bases that benchmarks judge on: what their pictures show, and whose art it is."""

from __future__ import annotations

from dataclasses import dataclass, field

NO_ARTICLE = frozenset(
    """
    bacon beans bread broccoli butter cherries garlic glasses gloves grapes jeans popcorn scissors sushi fire
    badminton baseball blueberries bowling chopsticks coral footprints goggles lungs maracas pancakes peanuts sake salt
    shorts soap socks softball spaghetti sunglasses volleyball yarn
    """.split()
)
"""Subjects whose names stand in a sentence without "a"."""


@dataclass(frozen=True)
class World:
    """Emoji of one artist: `package` is the npm package of the art, `icons` names those that are not called alike."""

    package: str
    licence: str
    subjects: tuple[str, ...]
    icons: dict[str, str] = field(default_factory=dict)


WORLDS = {
    "noto": World(
        "@iconify-json/noto@1.2.9",
        "Google Noto Emoji, Apache-2.0",
        tuple(
            """
            bat bear beetle butterfly camel cat cow crab crocodile deer dog dolphin dragon duck eagle elephant fish
            flamingo fox frog giraffe goat hedgehog horse jellyfish kangaroo koala ladybug lion octopus owl panda
            parrot peacock penguin pig rabbit rooster shark snail snake spider swan tiger turkey turtle whale zebra
            avocado bacon banana bread broccoli butter carrot cherries coconut cookie croissant cucumber cupcake
            doughnut egg eggplant garlic grapes hamburger lemon lollipop melon mushroom peach pear pie pineapple
            pizza popcorn pretzel strawberry sushi taco tomato waffle watermelon cactus hibiscus rose sunflower
            tulip shamrock airplane ambulance bicycle bus helicopter rocket sailboat skateboard taxi anchor axe
            backpack balloon basketball bell bomb bone bucket camera candle castle chair coin crown door dress drum
            envelope fire gear ghost glasses gloves guitar hammer house jeans key kite ladder laptop lighthouse
            lipstick magnet megaphone microscope mountain necktie pencil rainbow ring robot scissors shield skull
            snowflake snowman star sun teapot television tent tooth tornado trophy trumpet umbrella violin volcano
            wheel
            """.split()
        ),
        {"ladybug": "lady-beetle"},
    ),
    "fluent": World(
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "Microsoft Fluent Emoji, MIT",
        tuple(
            """
            abacus accordion alien artist astronaut badger badminton bagel banjo baseball bathtub battery beaver bed
            bikini bison blackbird blossom blueberries boar boomerang bouquet bowling brain briefcase broom bug
            burrito candy canoe chestnut chipmunk chopsticks clipboard cloud coat cockroach coffin compass crayon
            crutch custard dagger detective donkey dove dumpling ewe factory feather ferry firecracker flashlight
            flute fly fondue footprints fountain goggles goose gorilla guard hamster handbag headphone hippopotamus
            hook hut hyacinth jar joystick kimono knot leopard lime lizard llama lobster locomotive lotus luggage
            lungs mango maracas mammoth mirror moai monkey moose motorcycle mouse newspaper ninja notebook olive
            onion orangutan otter oyster paintbrush pancakes peanuts pen pilot plunger poodle potato printer purse
            pushpin radio razor rhinoceros ribbon rock sake salt sandwich saxophone scarf scorpion screwdriver seal
            ship shortcake shorts shrimp skier skunk sled sloth soap socks softball spaghetti speedboat spoon squid
            stadium stethoscope stopwatch sunglasses syringe tamale tangerine telephone telescope thread ticket
            toilet toolbox toothbrush tractor train troll unicorn volleyball wastebasket watch wing wolf wrench yarn
            """.split()
        ),
    ),
    "silhouettes": World(
        "@iconify-json/game-icons@1.2.4",
        "game-icons.net, by Lorc, Delapouite and contributors, CC BY 3.0",
        tuple(
            """
            acorn anvil armadillo axolotl balaclava bamboo beehive biplane blender bulldozer cabbage cage cannon
            catapult cauldron centaur centipede chainsaw chariot clarinet cobweb corkscrew crossbow daisy dragonfly
            elevator fez forklift gamepad hanger harp helmet hourglass igloo jug lantern lyre mailbox mermaid metronome
            nunchaku ostrich pagoda palm pegasus quiver raven scarecrow scythe seahorse sombrero submarine suitcase
            sundial toaster tombstone toucan trident unicycle vulture wheelbarrow windmill xylophone zeppelin
            """.split()
        ),
    ),
}
"""The bases of benchmarks. No subject is in two of them, nor in the sketchbook."""


def phrase(subject: str, adjective: str = "") -> str:
    """Return the subject with its article: "an egg", "a small cat", "scissors"."""
    words = f"{adjective} {subject}".strip()
    if subject in NO_ARTICLE:
        return words
    return f"{'an' if words[0] in 'aeiou' and not words.startswith(('uni', 'ewe')) else 'a'} {words}"
