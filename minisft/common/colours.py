"""The colours of every picture: Okabe and Ito's, which stay apart for colour-blind readers.

Ref: Okabe and Ito 2008, Color Universal Design.
"""

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
