# One image for CPU and GPU. The first command builds it for the CPU, the second for CUDA:
#   docker build -t latentplan .
#   docker build -t latentplan --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
# Any Debian or Ubuntu base works if it has Python 3.11 or 3.12, or apt can install it. torch brings
# its own CUDA libraries, so NVIDIA's smallest base suffices. Pin BASE by digest for a fixed image.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

# The NVIDIA runtime provides rendering as well as computing, and the GL dispatcher finds its EGL.
# Without a GPU neither setting has an effect, and Mesa renders in software.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
RUN mkdir -p /usr/share/glvnd/egl_vendor.d \
    && echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "libEGL_nvidia.so.0"}}' \
        > /usr/share/glvnd/egl_vendor.d/10_nvidia.json

# tools/quickstart and tools/test run these scripts too, so continuous integration tests them.
WORKDIR /opt/latentplan
COPY tools/common.sh tools/install-system tools/
RUN tools/install-system && rm -rf /var/lib/apt/lists/*

# The files that determine the packages' versions are copied first, so that a change of the code
# does not install the packages again.
ENV LATENTPLAN_VENV=/opt/venv \
    PIP_NO_CACHE_DIR=1
COPY setup.cfg pyproject.toml constraints.txt LICENSE ./
COPY tools/install-python tools/
COPY latentplan/__init__.py latentplan/
RUN tools/install-python plot,video
COPY . .

# The image also runs as any other user (docker run --user): all users may write to home, caches and
# /runs, and USER gives a name to a user without an entry in the password file. Compiled code stays
# with the runs, so that the next container does not spend its first minute on compiling again. So
# does the record of the Python files that training has run (docs/reliability.md).
RUN useradd --create-home --uid 10001 latentplan \
    && install -d -m 1777 /runs && chmod 1777 /home/latentplan
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/latentplan \
    USER=latentplan \
    TORCHINDUCTOR_CACHE_DIR=/runs/.torchinductor \
    LATENTPLAN_STATE=/runs/.latentplan
USER latentplan
VOLUME /runs
# From this working folder the default run folder, runs/..., is a folder of the volume.
WORKDIR /
# run.json records the commit that made a run. The image has no .git folder that would give it.
ARG COMMIT
ENV LATENTPLAN_COMMIT=${COMMIT}
ENTRYPOINT ["latentplan"]
CMD ["--help"]
