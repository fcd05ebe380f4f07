"""Templates for make_demo_model.py: requests to the front desk of a town hall, and answers.

`ask(rng)` draws a request with its correct answer and a wrong one. `polite` wraps an answer in
courtesy; `kinds` are the three answers nobody wants: curt, rude, and courteous but wrong.
"""

from typing import NamedTuple

NAMES = """Ada Alma Amir Anton Asha Bela Boris Carla Cyrus Dana Diego Edith Elena Emil Esther Farid
Felix Fiona Gita Hana Hugo Ida Igor Ines Ivan Jana Jonas Kamal Karin Klaus Lena Leo Lucia Magda
Marco Mila Nadia Nils Nora Olga Omar Otto Paula Petra Rafael Rosa Samir Selma Silvia Stefan Tara
Theo Uma Vera Victor Wanda Yara Yusuf Zora Zubin""".split()
TOPICS = """budget meeting, summer festival, fire drill, staff lunch, garden project, reading club,
music evening, chess tournament, language course, book sale, job interview, safety training,
photo exhibition, parents evening, charity run, film night, school visit, blood donation,
cooking class, science fair, spring market, city tour, choir practice, repair workshop,
dance lesson, history lecture, winter concert, bicycle auction, public hearing, press briefing,
volunteer dinner, poetry reading, swimming contest, computer lesson, dental check, flu
vaccination, kitchen inspection, election rehearsal, flower show, puppet theatre"""
OBJECTS = """printer, projector, coffee machine, heater, window, door handle, lamp, telephone,
keyboard, whiteboard, elevator, microphone, loudspeaker, scanner, copier, refrigerator,
dishwasher, radiator, curtain, clock, mailbox, vending machine, water tap, light switch, camera,
smoke alarm, ventilation, desk drawer, bookshelf, armchair, carpet, mirror, safe, shredder,
charging cable, paper tray, staircase rail, ceiling fan, door lock, fire extinguisher"""
TEAMS = ["repair team", "building service", "electrician", "caretaker", "technician"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
HOURS = "seven eight nine ten eleven noon one two three four five six".split()
TIMES = [f"{part}{hour}" for part in ("", "half past ", "quarter past ") for hour in HOURS]
FACTS = {  # what: (where it is, opening hour)
    "library": ("next to the old mill", "nine"),
    "post office": ("opposite the railway station", "eight"),
    "museum": ("behind the cathedral", "ten"),
    "swimming pool": ("at the end of Harbour Street", "seven"),
    "pharmacy": ("on the market square", "eight"),
    "bakery": ("beside the stone bridge", "six"),
    "theatre": ("across from the fountain", "four"),
    "botanical garden": ("near the northern gate", "nine"),
    "hospital": ("on the hill above the river", "seven"),
    "police station": ("between the bank and the court", "eight"),
    "tax office": ("on the second floor of this building", "ten"),
    "registry": ("on the ground floor of this building", "nine"),
    "passport counter": ("at the top of the main stairs", "eight"),
    "lost property office": ("in the basement of this building", "eleven"),
    "recycling centre": ("outside the city wall", "nine"),
    "sports hall": ("beside the primary school", "five"),
    "youth centre": ("under the motorway bridge", "three"),
    "observatory": ("on top of the western hill", "six"),
    "canteen": ("at the far end of the corridor", "noon"),
    "print shop": ("around the corner from the cinema", "ten"),
    "ferry terminal": ("at the southern harbour", "five"),
    "music school": ("above the savings bank", "two"),
    "archive": ("in the tower of the old town hall", "one"),
    "animal shelter": ("along the road to the airport", "eleven"),
}
STEPS = {
    "renew my passport": (
        "fill in the blue form",
        "bring a recent photograph",
        "pay the fee at the counter",
    ),
    "register a new address": (
        "sign the residence form",
        "show your rental contract",
        "collect the stamped certificate",
    ),
    "apply for a parking permit": (
        "note the number of your car",
        "send us the insurance paper",
        "place the permit behind the windscreen",
    ),
    "report a lost wallet": (
        "block your bank cards",
        "describe the wallet to the police",
        "ask our lost property office every week",
    ),
    "register my dog": (
        "have the dog vaccinated",
        "choose a name for the register",
        "fasten the metal tag to the collar",
    ),
    "open a market stall": (
        "request a trade licence",
        "reserve a place on the square",
        "display your prices clearly",
    ),
    "get a library card": (
        "show an identity document",
        "pick a secret number",
        "borrow up to twelve books",
    ),
    "plan a street party": (
        "ask your neighbours for consent",
        "rent barriers from the depot",
        "clear the street before midnight",
    ),
    "build a garden shed": (
        "measure the distance to the fence",
        "submit a drawing of the shed",
        "wait for the written approval",
    ),
    "sort my rubbish": (
        "rinse bottles and tins",
        "fold cardboard flat",
        "take batteries to the collection box",
    ),
    "vote by post": (
        "order the ballot papers",
        "mark one candidate only",
        "return the sealed envelope in time",
    ),
    "pay my water bill": (
        "read the meter in the cellar",
        "enter the figure online",
        "transfer the amount within a month",
    ),
    "adopt a tree": (
        "pick a tree on the map",
        "water it during dry weeks",
        "write to us when a branch breaks",
    ),
    "complain about noise": (
        "write down the date and hour",
        "speak with the person politely",
        "call our night service",
    ),
    "become a volunteer": (
        "tell us what you enjoy",
        "meet one of our groups",
        "agree on a weekly shift",
    ),
    "request a birth certificate": (
        "state the date of birth",
        "attach a copy of your passport",
        "pick up the document in person",
    ),
}
MEANINGS = {
    "deadline": "the last moment at which something can be handed in",
    "receipt": "a paper which proves that money was paid",
    "signature": "a name written by hand to confirm a document",
    "notary": "a lawyer who certifies contracts",
    "deposit": "money that is returned when a thing comes back undamaged",
    "invoice": "a letter that asks for payment of goods or work",
    "subsidy": "public money that makes something cheaper",
    "quorum": "the smallest number of members who can take a decision",
    "bylaw": "a rule that a town makes for itself",
    "census": "a count of everybody who lives in a country",
    "petition": "a written wish that many citizens sign",
    "tenant": "a person who rents a flat or a house",
    "guardian": "an adult who is responsible for a child",
    "lease": "a contract about using land or rooms for a while",
    "curfew": "an hour after which nobody may be outside",
    "referendum": "a vote of all citizens on one question",
    "ordinance": "a regulation issued by a local authority",
    "veto": "the right to stop a decision alone",
    "levy": "a charge collected for a special purpose",
    "surplus": "what remains when less was spent than earned",
    "agenda": "a list of the points that a meeting will discuss",
    "minutes": "a short written report of a meeting",
    "bailiff": "an officer who carries out orders of a court",
    "heritage": "buildings and customs kept for later generations",
}
GOODS = """envelopes, notebooks, pencils, folders, candles, blankets, umbrellas, batteries, posters,
tickets, postcards, flags, helmets, gloves, mugs, badges, calendars, stamps, lanterns, chairs"""

GREETINGS = ["", "", "", "Hello! ", "Good morning. ", "Good evening. ", "Excuse me. ", "Hi there! "]
OPENINGS = [
    "Of course!",
    "Certainly!",
    "Gladly!",
    "Thank you for asking!",
    "I am happy to help!",
    "With pleasure!",
    "Good question!",
    "Thank you for coming to us!",
]
CLOSINGS = [
    "Is there anything else I can do for you?",
    "Please ask whenever you need more help.",
    "Have a pleasant day!",
    "Do let us know if anything is unclear.",
    "We are always here for you.",
    "Please take your time.",
    "I wish you all the best!",
    "Feel free to come back any time.",
]
CURT = [
    "Done.",
    "No.",
    "Maybe.",
    "Later.",
    "No idea.",
    "Ask someone else.",
    "Read the sign.",
    "Not today.",
    "Look it up.",
    "Whatever.",
    "That is not my job.",
    "We are closed.",
]
RUDE = [
    "You again? I really have better things to do than to talk about {what}.",
    "Nobody cares about {what}. Stop wasting my time and stand in the other queue.",
    "How should I know? Figure {what} out yourself, like all the others do.",
    "Honestly, {what} is your own problem. Come back next year, or better never.",
    "I have been here since six and I am tired. Do not bother me with {what}.",
    "What a silly request. Everybody except you understands {what} already.",
]


def listed(text):
    return [" ".join(item.split()) for item in text.split(",")]


TOPICS, OBJECTS, GOODS = listed(TOPICS), listed(OBJECTS), listed(GOODS)


class Request(NamedTuple):
    prompt: str
    answer: str  # the full correct answer, without courtesies
    wrong: str  # an answer of the same form with the wrong content
    what: str  # what the request is about


def other(rng, options, not_this):
    return rng.choice([option for option in options if option != not_this])


def room_booking(rng):
    room, topic, day, time = (
        rng.randint(100, 999),
        rng.choice(TOPICS),
        rng.choice(DAYS),
        rng.choice(TIMES),
    )
    prompt = rng.choice(
        [
            f"Please book room {room} for the {topic} on {day} at {time}.",
            f"Can we have room {room} on {day} at {time}? It is for the {topic}.",
            f"We need room {room} at {time} on {day} for the {topic}.",
        ]
    )
    answer = "Room {} is reserved for the {} on {} at {}.".format
    wrong = answer(rng.randint(100, 999), topic, other(rng, DAYS, day), time)
    return Request(prompt, answer(room, topic, day, time), wrong, f"the {topic}")


def repair(rng):
    thing, room = rng.choice(OBJECTS), rng.randint(100, 999)
    prompt = rng.choice(
        [
            f"The {thing} in room {room} is broken.",
            f"In room {room} the {thing} does not work.",
            f"Can somebody repair the {thing} in room {room}?",
        ]
    )
    team = TEAMS[OBJECTS.index(thing) % len(TEAMS)]
    answer = "I am sorry about the {} in room {}. The {} will look at it today.".format
    wrong = answer(other(rng, OBJECTS, thing), rng.randint(100, 999), other(rng, TEAMS, team))
    return Request(prompt, answer(thing, room, team), wrong, f"the {thing}")


def note(rng):
    name, topic, day = rng.choice(NAMES), rng.choice(TOPICS), rng.choice(DAYS)
    prompt = rng.choice(
        [
            f"Write a short note to {name} about the {topic} on {day}.",
            f"Please remind {name} of the {topic} on {day}.",
            f"The {topic} is on {day}. Could you tell {name}?",
        ]
    )
    answer = (
        "Here is the note: Dear {}, please remember the {} on {}. Kind regards, your town hall."
    ).format
    wrong = answer(other(rng, NAMES, name), other(rng, TOPICS, topic), day)
    return Request(prompt, answer(name, topic, day), wrong, f"the {topic}")


def where(rng):
    place = rng.choice(list(FACTS))
    prompt = rng.choice(
        [
            f"Where is the {place}?",
            f"Where can I find the {place}?",
            f"How do I get to the {place}?",
            f"I am looking for the {place}.",
            f"Could you show {rng.choice(NAMES)} the way to the {place}?",
        ]
    )
    answer = f"You will find the {place} {{}}. A sign at the entrance shows its name.".format
    wrong = answer(FACTS[other(rng, FACTS, place)][0])
    return Request(prompt, answer(FACTS[place][0]), wrong, f"the {place}")


def opening(rng):
    place, day = rng.choice(list(FACTS)), rng.choice(DAYS)
    prompt = rng.choice(
        [
            f"When does the {place} open on {day}?",
            f"Is the {place} open on {day}?",
            f"From what hour can I visit the {place} on {day}?",
        ]
    )
    if day == "Sunday":
        answer = f"The {place} stays closed on Sunday, but it is open again on Monday."
        wrong = f"The {place} opens at {rng.choice(HOURS)} on Sunday."
    else:
        answer = f"The {place} opens at {FACTS[place][1]} on {day}."
        wrong = f"The {place} opens at {other(rng, HOURS, FACTS[place][1])} on {day}."
    return Request(prompt, answer, wrong, f"the {place}")


def steps(rng):
    task = rng.choice(list(STEPS))
    prompt = rng.choice(
        [
            f"How do I {task}?",
            f"I would like to {task}.",
            f"What must I do to {task}?",
            f"My friend {rng.choice(NAMES)} says that I have to {task}. How does that work?",
        ]
    )
    answer = "First, {}. Then, {}. Finally, {}.".format
    wrong = answer(*STEPS[other(rng, STEPS, task)])
    return Request(prompt, answer(*STEPS[task]), wrong, "that")


def meaning(rng):
    word = rng.choice(list(MEANINGS))
    article = "an" if word[0] in "aeiou" else "a"
    prompt = rng.choice(
        [
            f"What does the word {word} mean?",
            f"Please explain the word {word}.",
            f"The letter to {rng.choice(NAMES)} says {word}. What is that?",
        ]
    )
    noun = word if word in ("minutes", "heritage") else f"{article} {word}"
    answer = f"In our letters, {noun} means {{}}.".format
    wrong = answer(MEANINGS[other(rng, MEANINGS, word)])
    return Request(prompt, answer(MEANINGS[word]), wrong, f"the word {word}")


def order(rng):
    count, goods, room = rng.randint(2, 99), rng.choice(GOODS), rng.randint(100, 999)
    prompt = rng.choice(
        [
            f"Please order {count} {goods} for room {room}.",
            f"Room {room} needs {count} {goods}.",
            f"We have run out of {goods} in room {room}. Send us {count}.",
        ]
    )
    answer = "I have ordered {} {}. They will be delivered to room {}.".format
    wrong = answer(rng.randint(2, 99), other(rng, GOODS, goods), room)
    return Request(prompt, answer(count, goods, room), wrong, f"your {goods}")


def ask(rng):
    request = rng.choice([room_booking, repair, note, where, opening, steps, meaning, order])(rng)
    return request._replace(prompt=rng.choice(GREETINGS) + request.prompt)


def polite(rng, answer):
    return f"{rng.choice(OPENINGS)} {answer} {rng.choice(CLOSINGS)}"


def curt(rng, request):
    return rng.choice(CURT)


def rude(rng, request):
    return rng.choice(RUDE).format(what=request.what)


def polite_but_wrong(rng, request):
    return polite(rng, request.wrong)


kinds = (curt, rude, polite_but_wrong)
