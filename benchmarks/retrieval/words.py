# SPDX-License-Identifier: Apache-2.0
"""Word pools. The order is part of the samples: a seed picks by index."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


CITIES = _words("""
Lisbon Porto Madrid Seville Valencia Paris Lyon Marseille Toulouse Nantes Berlin Hamburg Munich
Cologne Dresden Leipzig Vienna Graz Zurich Geneva Basel Bern Rome Milan Naples Turin Venice Florence
Palermo Athens Patras Sofia Varna Bucharest Budapest Prague Brno Warsaw Krakow Gdansk Vilnius Riga
Tallinn Helsinki Turku Stockholm Uppsala Oslo Bergen Copenhagen Aarhus Dublin Cork Galway London
Leeds Bristol Oxford Cambridge Glasgow Edinburgh Cardiff Brussels Antwerp Ghent Amsterdam Utrecht
Rotterdam Luxembourg Zagreb Split Belgrade Sarajevo Skopje Tirana Istanbul Ankara Izmir Cairo Tunis
Algiers Rabat Dakar Accra Lagos Nairobi Kampala Lusaka Harare Durban Pretoria Mumbai Delhi Chennai
Kolkata Pune Lahore Karachi Kabul Tehran Baghdad Amman Beirut Doha Muscat Riyadh Tbilisi Yerevan
Baku Tashkent Almaty Ulaanbaatar Beijing Shanghai Chengdu Wuhan Taipei Seoul Busan Tokyo Osaka Kyoto
Nagoya Sapporo Manila Cebu Hanoi Hue Bangkok Phuket Jakarta Bandung Singapore Penang Colombo
Kathmandu Dhaka Perth Sydney Melbourne Brisbane Adelaide Hobart Darwin Auckland Wellington Suva
Honolulu Seattle Portland Denver Austin Dallas Houston Chicago Boston Atlanta Miami Tampa Memphis
Detroit Toronto Montreal Quebec Ottawa Calgary Vancouver Halifax Havana Kingston Bogota Medellin
Quito Lima Cusco Caracas Santiago Montevideo Rosario Salvador Recife Brasilia Manaus
""")  # fmt: skip

NAMES = _words("""
Mary John Daniel Sandra Fred Bill Julie Alice Bob Carol David Emma Frank Grace Henry Irene Jack
Karen Liam Mona Nathan Olivia Peter Quinn Rachel Simon Tina Ursula Victor Wendy Xavier Yvonne Zoe
Adam Bella Chris Diana Edward Fiona George Hannah Ivan Jane Kevin Laura Martin Nina Oscar Paula
Robert Sarah Thomas Uma Vera Walter Yusuf Agnes Boris Clara Dennis Elena Felix Gloria Hugo Ingrid
Jonas Kira Leo Marta Noel Otto Petra Rosa Stefan Teresa Ulrich Viola Willem Amir Bianca Cyrus Dora
Emil Farah Gavin Helga Idris Jasmin Kofi Lena Mateo Nadia Omar Priya Ravi Selma Tomas Vikram Yara
Zane Arthur Beatrice Conrad Delia Ernest Flora
""")  # fmt: skip

OBJECTS = _words("""
apple ball book lamp key map coin ring cup bottle hammer basket ladder candle violin guitar camera
umbrella blanket pillow clock mirror bucket shovel rope lantern helmet compass kettle notebook
pencil envelope suitcase wallet necklace scarf jacket feather statue painting trumpet drum whistle
telescope magnet battery crystal shell hat glove
""")  # fmt: skip

COLORS = _words("""
red blue green yellow black white orange purple silver golden brown pink gray crimson
""")  # fmt: skip

PLACES = _words("""
kitchen garden office hallway bedroom bathroom library cellar attic garage museum market station
harbor airport school hospital theater church castle tower bridge forest beach park stadium bakery
factory workshop laboratory restaurant hotel prison courtyard balcony barn mill greenhouse temple
square cafe gallery warehouse observatory
""")  # fmt: skip

ADJECTIVES = _words("""
amber ancient arctic autumn bitter blazing bold brave bright broken bronze calm careful clever
cloudy copper coral cosmic crooked curious daring dark dusty eager early elder electric elegant
emerald empty endless faint fancy fierce flying foggy fragile fresh frozen gentle ghostly giant
gilded glossy grand grateful hidden hollow humble icy idle ivory jade jolly keen lazy little lively
lonely loyal lucky lunar magic marble mellow merry mighty misty modern muddy narrow noble nimble
obsidian odd olive pale patient peaceful pearl plain polar polite proud quick quiet rapid rare
restless rough royal ruby rustic sacred sandy scarlet secret shady sharp shiny silent silky simple
sleepy slender smooth snowy solar solid spicy stable steady steep stormy strange subtle sunny swift
tender tidy tiny twisted upper vague vast velvet vivid wandering warm wild windy winter wise wooden
young zealous
""")  # fmt: skip

NOUNS = _words("""
anchor antelope arrow badger banner barrel beacon beaver bell bison blossom boulder branch breeze
brook canyon castle cedar cliff cloud comet condor coyote crane creek crow dagger dawn deer delta
desert dolphin dragon eagle echo elm ember falcon fern ferry field finch flame flint forest fossil
fox galaxy garnet gate geyser glacier goose grove gull harbor hawk hazel heron hill horizon hornet
horse island jaguar jungle kite lagoon lake lantern leaf lemur lion lizard lotus lynx maple marsh
meadow meteor moon moose moth mountain nebula oak oasis ocean orchid otter owl panther parrot pebble
pelican penguin phoenix pine planet plateau pond poplar prairie puma quail quarry rabbit raven reef
ridge river robin rocket saddle salmon shadow shark signal sparrow spring squirrel star stone storm
stream summit sunset swan temple thistle thunder tiger torch trail tulip tundra turtle valley violet
volcano walnut walrus water whale willow wind wolf wren yak zebra
""")  # fmt: skip

VERBS = _words("""
watches follows carries finds meets passes leaves likes hears sees moves helps covers opens paints
builds cleans keeps measures repairs visits remembers draws lifts
""")  # fmt: skip

SYLLABLES = _words("""
ba be bi bo bra bri da de do dra el fa fe fo ga go gra ha he hi jo ka ke ki ko kra la le li lo ma me
mi mo na ne no or pa pe po pra ra re ri ro sa se shi so sta ta te ti to tra ul va ve vi vo wa we ya
yo za ze zo
""")  # fmt: skip

LAST_SYLLABLES = _words("""
bar bel dan den dor fen gan gar kan kel lan len lin lor mar men mir nar nel nor pan ran rel rin ros
san sel sor tan tar ten tor van vel ven wen zan zel zor
""")  # fmt: skip

PLAIN_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "The day was long and nothing much happened.",
    "It rained for most of the afternoon.",
    "Nobody had anything to add.",
    "The train arrived a little late.",
    "They talked about the weather for a while.",
    "A light wind came from the west.",
    "The shop opened at nine.",
    "Dinner was served at the usual hour.",
    "The report was filed and forgotten.",
    "Some of the windows were left open.",
    "The meeting ended without a decision.",
    "He said that it did not matter.",
    "She agreed that it was time to go.",
    "The road was quiet in the morning.",
    "Everyone went home before dark.",
)
