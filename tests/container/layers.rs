//! An image of a hundred layers behind either wall.

use rvmm::image::layers::testing::Archive;
use rvmm::image::{Store, testing};

use super::home::{Home, Wall, busybox_layer, can_run};

/// Layers, with busybox's.
const LAYERS: usize = 100;

/// Each layer has a file of its own, replaces that of all, and every tenth takes away what the fifth before it has made.
fn image(home: &Home) {
    let store = Store::open(&home.path("data/images")).expect("a store");
    let mut layers = vec![busybox_layer().expect("busybox")];
    for number in 1..LAYERS {
        let text = format!("{number}\n");
        let mut layer = Archive::new();
        if number == 1 {
            layer = layer.directory("own", 0o755);
        }
        layer = layer.file(&format!("own/{number}"), &text).file("top", &text);
        if number % 10 == 0 {
            layer = layer.file(&format!("own/.wh.{}", number - 5), "");
        }
        layers.push(layer.finish());
    }
    testing::image(&store, "tall", &layers).expect("an image");
}

fn tall(wall: Wall) {
    if !can_run(wall) {
        return;
    }
    let home = Home::new();
    image(&home);
    let script = "cat /top /own/99 /own/1; set -- /own/*; echo $#; echo mine >/top; rm /own/1; cat /top; test -e /own/1 || echo gone";
    let ran = home.run(&["run", "--rm", wall.flag(), "--network=none", "tall", "sh", "-c", script]);
    assert_eq!(ran.ok(), "99\n99\n1\n90\nmine\ngone\n");
    // And the next one has them as they were.
    let ran = home.run(&["run", "--rm", wall.flag(), "--network=none", "tall", "cat", "/top", "/own/1"]);
    assert_eq!(ran.ok(), "99\n1\n");
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
fn image_of_100_layers_runs_natively() {
    tall(Wall::Native);
}

#[test]
fn image_of_100_layers_runs_in_a_microvm() {
    tall(Wall::Microvm);
}
