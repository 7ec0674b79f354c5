"""The demo's species: each song as its published description has it, in named parameters.

The descriptions give the notes, their order, shape, quality, rhythm and rough pitch, retold here in
our own words. Where a source gives no number, the hertz and seconds are ours.

AAB    All About Birds, Cornell Lab of Ornithology, allaboutbirds.org, each species' page "Sounds"
BNA    The Birds of North America, Cornell Lab of Ornithology and American Ornithologists' Union,
       with the number, authors and year of the account
Sibley D. A. Sibley, The Sibley Guide to Birds, 2000, "voice"
"""

from __future__ import annotations

from functools import partial

from birdcall.demo.synthesis import REEDY, WHISTLE, Motif, Phrase, Syllable, SyntheticSpecies

# Levels of the harmonics, dB.
_HOOT = (0.0, -18.0, -26.0)
_CAW = (-8.0, -3.0, 0.0, -2.0, -6.0, -10.0, -14.0, -20.0)
_DEE = (-14.0, -1.0, 0.0, -12.0)
_JEER = (-10.0, -1.0, 0.0, -4.0, -10.0, -16.0)


def _song(name: str, *motifs: Motif) -> Phrase:
    return Phrase(name, motifs)


def _call(name: str, *motifs: Motif) -> Phrase:
    return Phrase(name, motifs, kind="call")


def _motif(*syllables: Syllable, times: tuple[int, int] = (1, 1), **changes: float) -> Motif:
    return Motif(syllables, times, **changes)


def _tone(hz: tuple[float, ...], seconds: float, gap: float = 0.05, db: float = 0.0) -> Syllable:
    """A clear whistle through the pitches ``hz``; ``gap``: seconds of silence after it."""
    return Syllable(hz, seconds, gap, gain_db=db, harmonics_db=WHISTLE)


def _hoarse(
    hz: tuple[float, ...],
    seconds: float,
    gap: float,
    *,
    like: tuple[float, ...],
    rough: tuple[float, float],
) -> Syllable:
    """A rough voice with the harmonics ``like``; ``rough``: its share, and bandwidth in Hz."""
    roughness, rough_hz = rough
    return Syllable(hz, seconds, gap, harmonics_db=like, roughness=roughness, rough_hz=rough_hz)


# --- clear whistles: three species share 3 to 4.5 kHz -------------------------------------------

_BLACK_CAPPED_CHICKADEE = SyntheticSpecies(
    ebird_code="bkcchi",
    scientific_name="Poecile atricapillus",
    common_name="Black-capped Chickadee",
    description="Two pure whistles, fee-bee, together about a second; the second is lower by a "
    "fixed ratio and breaks briefly in its middle. The call: thin chicks, then hoarse dees.",
    source="BNA 39, Foote et al. 2010; Weisman et al., Condor 92, 1990; AAB",
    band_hz=(3_250, 4_050),
    phrases=(
        _song(
            "fee-bee",
            _motif(
                _tone((4_050, 3_900, 3_800), 0.42, 0.11),
                _tone((3_330, 3_350, 3_320), 0.24, 0.015),
                _tone((3_330, 3_320, 3_270), 0.17),
            ),
        ),
        _call(
            "chick-a-dee",
            _motif(_tone((6_800, 8_200, 5_600), 0.05, 0.03), times=(1, 2)),
            _motif(
                _hoarse((1_750, 1_800, 1_700), 0.16, 0.035, like=_DEE, rough=(0.35, 400)),
                times=(2, 5),
            ),
        ),
    ),
    repertoire=(1, 2),
    song_gap_seconds=(2.0, 4.5),
)

_WHITE_THROATED_SPARROW = SyntheticSpecies(
    ebird_code="whtspa",
    scientific_name="Zonotrichia albicollis",
    common_name="White-throated Sparrow",
    description="A slow song of pure, wavering whistles of about 4 seconds: two long notes, then "
    "notes in triplets, 'oh sweet Canada Canada'; one change of pitch, up or down.",
    source="BNA 128, Falls and Kopachena 2010; AAB",
    band_hz=(3_000, 4_400),
    phrases=(
        _song(
            "ascending",
            _motif(_tone((3_050, 3_080), 0.55, 0.12), _tone((4_150, 4_200, 4_180), 0.75, 0.10)),
            _motif(
                _tone((4_150, 4_160), 0.17, 0.03),
                _tone((4_150, 4_140), 0.15, 0.03),
                _tone((4_150, 4_120), 0.20, 0.09),
                times=(2, 3),
            ),
        ),
        _song(
            "descending",
            _motif(
                _tone((4_350, 4_380), 0.65, 0.10),
                _tone((4_330, 4_300), 0.30, 0.05),
                _tone((3_450, 3_430), 0.60, 0.11),
            ),
            _motif(
                _tone((3_430, 3_440), 0.17, 0.03),
                _tone((3_430, 3_420), 0.15, 0.03),
                _tone((3_420, 3_390), 0.20, 0.09),
                times=(2, 3),
            ),
        ),
    ),
    song_gap_seconds=(4.0, 9.0),
)

_EASTERN_WOOD_PEWEE = SyntheticSpecies(
    ebird_code="eawpew",
    scientific_name="Contopus virens",
    common_name="Eastern Wood-Pewee",
    description="A plaintive slurred whistle, pee-a-wee, falling to a short low middle and rising "
    "again; after several of them a falling wee-oo.",
    source="BNA 245, McCarty 1996; AAB; Kroodsma, birdsongforthecurious.com, example 606",
    band_hz=(2_700, 4_500),
    phrases=(
        _song(
            "pee-a-wee",
            _motif(
                _tone((3_900, 4_350, 4_150), 0.35, 0.02),
                _tone((3_500, 3_000, 3_200), 0.16, 0.02, db=-4),
                _tone((3_250, 3_300, 3_600, 4_250), 0.50),
            ),
        ),
        _song("wee-oo", _motif(_tone((4_200, 4_350, 3_900, 3_250, 2_750), 0.75))),
    ),
    repertoire=(2, 2),
    song_gap_seconds=(3.0, 7.0),
)

# --- trills: the same band, told apart by rate and by how steep the notes are -------------------

_CHIPPING_SPARROW = SyntheticSpecies(
    ebird_code="chispa",
    scientific_name="Spizella passerina",
    common_name="Chipping Sparrow",
    description="A long, dry, mechanical trill on one pitch: one steep note repeated too fast to "
    "count, 11 to 16 a second, for 2 to 4 seconds. Each bird has one song.",
    source="BNA 334, Middleton 1998; AAB; Sibley, 'Trilled songs of eastern birds', "
    "sibleyguides.com",
    band_hz=(3_300, 6_200),
    phrases=(
        _song("falling chips", _motif(_tone((6_200, 4_300, 3_400), 0.045, 0.030), times=(28, 46))),
        _song("rising chips", _motif(_tone((3_300, 4_600, 5_900), 0.042, 0.034), times=(28, 46))),
        _song("hooked chips", _motif(_tone((4_200, 5_900, 3_600), 0.048, 0.026), times=(28, 46))),
    ),
    song_gap_seconds=(3.0, 7.0),
)

_DARK_EYED_JUNCO = SyntheticSpecies(
    ebird_code="daejun",
    scientific_name="Junco hyemalis",
    common_name="Dark-eyed Junco",
    description="An even, ringing, musical trill of 7 to 23 notes in up to 2 seconds: slower than "
    "the Chipping Sparrow's, its notes simple whistles. A bird has a few trills.",
    source="BNA 716, Nolan et al. 2002; AAB",
    band_hz=(3_000, 5_600),
    phrases=(
        _song("falling trill", _motif(_tone((5_200, 4_600, 3_900), 0.085, 0.040), times=(10, 16))),
        _song(
            "two-note trill",
            _motif(
                _tone((3_700, 4_300), 0.055, 0.008),
                _tone((4_900, 4_500), 0.045, 0.020, db=-3),
                times=(9, 15),
            ),
        ),
        _song("arched trill", _motif(_tone((3_400, 4_500, 3_500), 0.090, 0.036), times=(9, 15))),
    ),
    repertoire=(1, 2),
    song_gap_seconds=(3.0, 7.0),
)

# --- repeated phrases of several notes, 2.5 to 7 kHz ---------------------------------------------

_COMMON_YELLOWTHROAT = SyntheticSpecies(
    ebird_code="comyel",
    scientific_name="Geothlypis trichas",
    common_name="Common Yellowthroat",
    description="A rolling witchety-witchety-witchety: 3 to 5 times the same phrase of three or "
    "four sharply slurred notes, about 2 seconds, even in loudness.",
    source="BNA 448, Guzy and Ritchison 1999; AAB",
    band_hz=(2_600, 6_200),
    phrases=(
        _song(
            "witchety",
            _motif(
                _tone((3_000, 4_100, 5_200), 0.10, 0.02),
                _tone((5_600, 3_900, 3_000), 0.09, 0.025),
                _tone((3_300, 4_700), 0.06, 0.02),
                _tone((4_600, 3_600, 2_700), 0.09, 0.03),
                times=(3, 5),
            ),
        ),
        _song(
            "which-is-it",
            _motif(
                _tone((5_900, 4_200, 2_900), 0.12, 0.03),
                _tone((2_700, 3_600, 3_000), 0.10, 0.03),
                _tone((3_900, 6_000, 5_200), 0.13, 0.05),
                times=(3, 5),
            ),
        ),
    ),
    song_gap_seconds=(3.0, 8.0),
)

_OVENBIRD = SyntheticSpecies(
    ebird_code="ovenbi1",
    scientific_name="Seiurus aurocapilla",
    common_name="Ovenbird",
    description="An emphatic tea-cher tea-cher TEA-CHER of 8 to 13 two-note phrases in 2.5 to 4 "
    "seconds, the down-slurred cher dominating, louder and louder to the end.",
    source="BNA 88, Van Horn and Donovan 1994; AAB; Kroodsma, listeningtoacontinentsing.com, VA-48",
    band_hz=(2_700, 7_000),
    phrases=(
        _song(
            "tea-cher",
            _motif(
                _tone((4_500, 6_900), 0.055, 0.02, db=-6),
                _tone((6_400, 5_000, 3_000), 0.15, 0.075),
                times=(8, 13),
                crescendo_db=18.0,
                accelerando=1.12,
            ),
        ),
        _song(
            "cher-tea",
            _motif(
                _tone((5_400, 3_600, 2_800), 0.13, 0.025),
                _tone((3_500, 5_800, 4_700), 0.085, 0.065, db=-4),
                times=(8, 13),
                crescendo_db=18.0,
                accelerando=1.12,
            ),
        ),
    ),
    song_gap_seconds=(4.0, 9.0),
)

# --- slurred whistles and carols, 1.3 to 4.5 kHz ------------------------------------------------

_CHEER = _tone((4_400, 3_300, 2_300, 1_800), 0.30, 0.11)
_WHOIT = _tone((1_700, 2_000, 2_900, 3_900), 0.26, 0.10)
_BIRDIE = (_tone((3_700, 2_600, 2_000), 0.11, 0.015), _tone((2_000, 2_700), 0.07, 0.045))

_NORTHERN_CARDINAL = SyntheticSpecies(
    ebird_code="norcar",
    scientific_name="Cardinalis cardinalis",
    common_name="Northern Cardinal",
    description="A loud string of 2 to 3 seconds of down-slurred or two-part whistles, cheer cheer "
    "cheer or whoit whoit, each repeated, getting faster, often ending in a slow trill.",
    source="BNA 440, Halkin and Linville 1999; AAB",
    band_hz=(1_700, 4_400),
    phrases=(
        _song(
            "cheer-birdie",
            _motif(_CHEER, times=(2, 4)),
            _motif(*_BIRDIE, times=(4, 8), accelerando=1.15),
        ),
        _song("whoit", _motif(_WHOIT, times=(4, 7), accelerando=1.4)),
        _song(
            "cheer-trill",
            _motif(_CHEER, times=(3, 5), accelerando=1.2),
            _motif(_tone((3_000, 2_200, 1_800), 0.08, 0.03), times=(6, 10)),
        ),
    ),
    repertoire=(1, 3),
    song_gap_seconds=(2.5, 6.0),
)

_AMERICAN_ROBIN = SyntheticSpecies(
    ebird_code="amerob",
    scientific_name="Turdus migratorius",
    common_name="American Robin",
    description="A carol of 3 to 8 rich whistled phrases, cheerily cheer-up cheerio, each of two "
    "or three slurs rising and falling, with short pauses between them.",
    source="BNA 462, Sallabanks and James 1999; AAB",
    band_hz=(1_600, 3_600),
    phrases=(
        _song(
            "cheerily",
            _motif(
                _tone((2_100, 2_900, 2_500), 0.12, 0.015),
                _tone((2_400, 1_900), 0.09, 0.015),
                _tone((2_000, 2_800), 0.12),
            ),
        ),
        _song(
            "cheer-up",
            _motif(_tone((2_900, 2_200, 1_900), 0.15, 0.02), _tone((2_000, 2_600, 3_200), 0.14)),
        ),
        _song(
            "cheerio",
            _motif(_tone((1_800, 2_500), 0.10, 0.01), _tone((2_700, 3_100, 2_300, 1_700), 0.24)),
        ),
        _song(
            "churry",
            _motif(
                _tone((2_500, 2_000, 2_500, 2_000, 2_400), 0.22, 0.02), _tone((2_900, 2_100), 0.10)
            ),
        ),
        _song(
            "tilly", _motif(_tone((3_500, 2_800), 0.08, 0.02), _tone((2_200, 1_700, 2_300), 0.20))
        ),
    ),
    repertoire=(3, 5),
    phrases_per_song=(3, 8),
    phrase_gap_seconds=(0.15, 0.45),
    song_gap_seconds=(1.5, 4.0),
)

# --- strident and harsh voices with strong overtones ---------------------------------------------

_KILLDEER = SyntheticSpecies(
    ebird_code="killde",
    scientific_name="Charadrius vociferus",
    common_name="Killdeer",
    description="A strident, high kill-deer or dee, each rising at its end, called again and "
    "again; alarmed birds give a string of dees.",
    source="BNA 517, Jackson and Jackson 2000; AAB",
    band_hz=(2_300, 3_900),
    phrases=(
        _call(
            "kill-deer",
            _motif(
                Syllable((2_300, 2_900, 2_500), 0.12, 0.02, -3, harmonics_db=REEDY),
                Syllable((2_500, 3_600, 3_800, 3_000), 0.34, 0.30, harmonics_db=REEDY),
                times=(2, 5),
            ),
        ),
        _call(
            "dee-dee",
            _motif(
                Syllable((2_600, 3_100, 3_700, 3_200), 0.26, 0.13, harmonics_db=REEDY), times=(3, 8)
            ),
        ),
    ),
    repertoire=(1, 2),
    song_gap_seconds=(1.0, 4.0),
)

_AMERICAN_CROW = SyntheticSpecies(
    ebird_code="amecro",
    scientific_name="Corvus brachyrhynchos",
    common_name="American Crow",
    description="A hoarse caw of about a third of a second, a stack of harmonics strongest at 1 to "
    "2 kHz that rises, then falls; mostly 2 to 6 in a row.",
    source="BNA 647, Verbeek and Caffrey 2002; AAB",
    band_hz=(430, 600),
    phrases=(
        _call(
            "caw",
            _motif(
                _hoarse((470, 580, 590, 540, 440), 0.34, 0.24, like=_CAW, rough=(0.4, 120)),
                times=(2, 6),
            ),
        ),
        _call(
            "short caw",
            _motif(
                _hoarse((520, 600, 480), 0.18, 0.13, like=_CAW, rough=(0.35, 120)), times=(3, 7)
            ),
        ),
    ),
    repertoire=(1, 2),
    song_gap_seconds=(2.0, 6.0),
)

_BLUE_JAY = SyntheticSpecies(
    ebird_code="blujay",
    scientific_name="Cyanocitta cristata",
    common_name="Blue Jay",
    description="A loud, harsh, falling jeer, strongest at 2 to 4.5 kHz, once to four times; also "
    "a squeaky, whistled 'rusty gate' of two notes.",
    source="BNA 469, Tarvin and Woolfenden 1999; AAB",
    band_hz=(1_050, 2_600),
    phrases=(
        _call(
            "jeer",
            _motif(
                _hoarse(
                    (1_150, 1_450, 1_400, 1_250, 1_050),
                    0.42,
                    0.22,
                    like=_JEER,
                    rough=(0.4, 350),
                ),
                times=(1, 4),
            ),
        ),
        _call(
            "rusty gate",
            _motif(
                Syllable((1_900, 2_550, 2_400), 0.14, 0.03, harmonics_db=REEDY),
                Syllable((1_700, 1_750, 2_100), 0.20, 0.25, harmonics_db=REEDY),
                times=(1, 3),
            ),
        ),
    ),
    repertoire=(1, 2),
    song_gap_seconds=(2.0, 5.0),
)

# --- low hoots: both below 700 Hz ----------------------------------------------------------------

_MOURNING_DOVE = SyntheticSpecies(
    ebird_code="moudov",
    scientific_name="Zenaida macroura",
    common_name="Mourning Dove",
    description="A soft, drawn-out lament, coo-OO-oo, coo, coo, coo: a note that jumps up and "
    "falls back, then two or three level coos, around 500 Hz, 3 to 4 seconds.",
    source="BNA 117, Otis et al. 2008; AAB",
    band_hz=(440, 660),
    phrases=(
        _song(
            "perch coo",
            _motif(
                Syllable((460, 480, 490), 0.42, 0.02, -6, harmonics_db=_HOOT),
                Syllable((500, 640, 630, 520), 0.40, 0.03, harmonics_db=_HOOT),
                Syllable((490, 470), 0.30, 0.32, -6, harmonics_db=_HOOT),
            ),
            _motif(Syllable((480, 500, 495, 480), 0.60, 0.38, harmonics_db=_HOOT), times=(2, 3)),
        ),
    ),
    song_gap_seconds=(3.0, 8.0),
)


_who = partial(Syllable, harmonics_db=(0.0, -12.0, -20.0), attack=0.2)
_WHO_COOKS = (
    _who((370, 400, 395), 0.15, 0.14),
    _who((380, 410, 400), 0.17, 0.30),
    _who((390, 420, 400), 0.14, 0.13),
)

_BARRED_OWL = SyntheticSpecies(
    ebird_code="brdowl",
    scientific_name="Strix varia",
    common_name="Barred Owl",
    description="Eight or nine emphatic hoots in two sentences, 'who cooks for you, who cooks for "
    "you-all', the last drawn out and falling; also a series of hoots that rises.",
    source="BNA 508, Mazur and James 2000; AAB",
    band_hz=(270, 480),
    phrases=(
        _song(
            "who cooks for you",
            _motif(*_WHO_COOKS, _who((420, 440, 350), 0.34, 0.45)),
            _motif(*_WHO_COOKS, _who((420, 450, 370), 0.28, 0.05)),
            _motif(_who((400, 370, 310, 270), 0.60, 0.0)),
        ),
        _song(
            "ascending hoots",
            _motif(
                _who((350, 370, 355), 0.13, 0.15),
                times=(6, 9),
                glide=1.2,
                accelerando=1.2,
                crescendo_db=5,
            ),
            _motif(_who((440, 450, 370, 290), 0.55, 0.0)),
        ),
    ),
    repertoire=(1, 2),
    song_gap_seconds=(5.0, 11.0),
)

SPECIES = (  # sorted by ebird_code
    _AMERICAN_CROW,
    _AMERICAN_ROBIN,
    _BLACK_CAPPED_CHICKADEE,
    _BLUE_JAY,
    _BARRED_OWL,
    _CHIPPING_SPARROW,
    _COMMON_YELLOWTHROAT,
    _DARK_EYED_JUNCO,
    _EASTERN_WOOD_PEWEE,
    _KILLDEER,
    _MOURNING_DOVE,
    _NORTHERN_CARDINAL,
    _OVENBIRD,
    _WHITE_THROATED_SPARROW,
)
