#!/bin/sh
# Makes assets/speech.wav, about five seconds of speech, and a file for each sentence of
# assets/sentences/sentences.txt; all 16 kHz mono, of a synthetic voice (Debian: espeak-ng, sox).
set -eu
cd "$(dirname "$0")/../../assets"
raw=$(mktemp --suffix=.wav)
trap 'rm -f "$raw"' EXIT

say() {  # say TEXT FILE
  espeak-ng -v en-us -s 150 -w "$raw" "$1"
  sox "$raw" -r 16000 -c 1 -b 16 -D "$2"
}

say "A graph that runs is not yet a graph that is right. Compare first, then measure." speech.wav
number=0
while read -r sentence; do
  number=$((number + 1))
  say "$sentence" "$(printf 'sentences/%02d.wav' "$number")"
done < sentences/sentences.txt
soxi speech.wav sentences/*.wav
