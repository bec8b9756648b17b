# Packages that are evaluated to derivations, with all their inputs, but can't be built.
{
  system,
  config ? { },
}:
let
  lib = import ./lib.nix;
  hostPlatform = {
    inherit system;
    isLinux = lib.hasPrefix "x86_64-linux" system || lib.hasPrefix "aarch64-linux" system;
    isx86_64 = lib.hasPrefix "x86_64" system;
  };
  # As nixpkgs' function: `passthru` and `meta` are no part of the derivation itself.
  mkDerivation =
    attrs:
    let
      own = builtins.removeAttrs attrs [
        "passthru"
        "meta"
        "env"
      ];
      result = derivation (
        own
        // (attrs.env or { })
        // {
          name = attrs.name or "${attrs.pname}-${attrs.version}";
          inherit system;
          builder = "/bin/sh";
        }
      );
    in
    result
    // attrs
    // attrs.passthru or { }
    // {
      passthru = attrs.passthru or { };
      meta = attrs.meta or { };
    };
  package = pname: mkDerivation { inherit pname; version = "1"; };
  # The build that `config` asks for, as part of the name.
  accelerated =
    pname:
    package (
      if config.cudaSupport or false then
        "${pname}-cuda"
      else if config.rocmSupport or false then
        "${pname}-rocm"
      else
        pname
    );
  unfree =
    wanted: if config.allowUnfree or false then wanted else throw "${wanted.name} is not free software";
  withTriton = torch: torch // { propagatedBuildInputs = [ (package "triton") ]; };

  # A package by its function, whose arguments are looked up by name.
  callFrom =
    scope: function: arguments:
    let
      called = if builtins.isFunction function then function else import function;
    in
    called (builtins.intersectAttrs (builtins.functionArgs called) scope // arguments);

  pkgs = {
    inherit lib pkgs;
    stdenv = {
      inherit mkDerivation hostPlatform;
    };
    callPackage = callFrom pkgs;
    newScope = scope: callFrom (pkgs // scope);
    python313 = package "python3" // {
      pythonVersion = "3.13";
      pkgs = {
        torch = withTriton (accelerated "torch");
        torch-bin = withTriton (unfree (package "torch-bin"));
      };
    };
    pythonManylinuxPackages.manylinux2014 = [ (package "glib") ];
    runCommand =
      name: attrs: buildCommand:
      mkDerivation (attrs // { inherit name buildCommand; });
    mkShell = mkDerivation;
    fetchPypi =
      {
        pname,
        version,
        format,
        dist,
        python,
        abi,
        platform,
        sha256,
      }:
      assert format == "wheel" && dist == python;
      # A derivation with a fixed output, as fetchurl makes; Nix checks the form of the hash.
      derivation {
        name = "${pname}-${version}-${python}-${abi}-${platform}.whl";
        inherit system;
        builder = "/bin/sh";
        outputHash = sha256;
        outputHashAlgo = "sha256";
        outputHashMode = "flat";
      };
  }
  // lib.genAttrs [
    "autoPatchelfHook"
    "git"
    "libxcb"
    "makeWrapper"
    "nixfmt-tree"
    "uv"
  ] package;
in
pkgs
