#!/bin/sh
# Makes assets/speech.wav: about five seconds of speech, 16 kHz mono (Debian: espeak-ng, sox).
set -eu
cd "$(dirname "$0")/../../assets"
raw=$(mktemp --suffix=.wav)
trap 'rm -f "$raw"' EXIT
espeak-ng -v en-us -s 150 -w "$raw" \
  "A graph that runs is not yet a graph that is right. Compare first, then measure."
sox "$raw" -r 16000 -c 1 -b 16 -D speech.wav
soxi speech.wav
